"""Checkpoints of any size, written as Transformers names and shapes them, with random bytes for weights."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fmoe import TensorSpec
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.types import bits

# Qwen3-30B-A3B and Qwen3.5-35B-A3B, with fewer layers and words, and hardly an eye
QWEN3 = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 4096}  # fmt: skip
QWEN3_5 = {"num_experts": 256, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 512,
           "shared_expert_intermediate_size": 512, "vocab_size": 4096}  # fmt: skip
EYE = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 2048}
CONFIGS: dict[str, dict[str, Any]] = {"qwen3_moe": QWEN3, "qwen3_5_moe": {"text_config": QWEN3_5, "vision_config": EYE}}
MODELS = {"qwen3_moe": transformers.Qwen3MoeForCausalLM, "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration}


def write(path: Path, model_type: str, gigabytes: float, shard_size: int = 1_000_000_000) -> int:
    """A checkpoint of about that size in the family's published layout; returns the bytes of its tensors."""
    sizes = CONFIGS[model_type].get("text_config", CONFIGS[model_type])
    layer = sizes["num_experts"] * sizes["hidden_size"] * sizes["moe_intermediate_size"] * 3 * 2
    sizes["num_hidden_layers"] = max(1, round(gigabytes * 1e9 / layer))
    config = transformers.AutoConfig.for_model(model_type, dtype="bfloat16", **CONFIGS[model_type])
    with torch.device("meta"):
        model = MODELS[model_type]._from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    specs: dict[str, TensorSpec] = {}
    for name, tensor in model.state_dict().items():
        specs |= _published(name, TensorSpec(tuple(tensor.shape), tensor.dtype), model_type)
    path.mkdir(parents=True)
    layout = Layout.of(specs, shard(specs, shard_size), {})
    random = bits(torch.randn(8_000_003).bfloat16())
    for file, (head, size) in layout.heads.items():
        with open(path / file, "wb") as out:
            out.write(head)
            left = size - len(head)
            while left:
                left -= out.write(_some(random, left))
    if layout.index:
        (path / "model.safetensors.index.json").write_text(layout.index)
    config.save_pretrained(path)
    return sum(spec.nbytes for spec in specs.values())


def _published(name: str, spec: TensorSpec, model_type: str) -> dict[str, TensorSpec]:
    """Names in memory -> names in files: Qwen3 stores every expert by itself, Qwen3.5 as it is in memory."""
    stem, _, what = name.rpartition(".experts.")
    if not stem or model_type != "qwen3_moe":
        return {name: spec}
    experts, rows, columns = spec.shape
    parts = ("gate_proj", "up_proj") if what == "gate_up_proj" else ("down_proj",)
    shape = (rows // len(parts), columns)
    return {f"{stem}.experts.{e}.{p}.weight": TensorSpec(shape, spec.dtype) for e in range(experts) for p in parts}


def _some(random: Tensor, most: int) -> memoryview:
    return random.numpy().data[:most]
