"""Tiny Transformers models of every family, seeded, and the directories that Transformers itself writes from them.

    model = build("mixtral")                    # eval mode; no parameter and no saved buffer keeps a neutral value
    model = write("mixtral", path)              # the same, saved: shards, index, config.json, a tokenizer
    for prefix, block in moe_blocks(model):     # "model.layers.0.block_sparse_moe" as on disk, and its module
        y = forward(block, x)                   # [B, S, D] -> [B, S, D]

No expert matrix is square. Checkpoints that Transformers does not write are in `hf_synthetic`.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

Config = dict[str, Any]


class Model(NamedTuple):
    """A Transformers class and its tiny configuration."""

    arch: str
    config: Config


BASE: Config = dict(
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
)

QWEN3: Config = BASE | dict(
    intermediate_size=40,
    num_hidden_layers=3,
    mlp_only_layers=[1],  # a dense layer among sparse ones: `mlp.gate_proj.weight` beside `mlp.gate.weight`
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
)

QWEN3_5: Config = BASE | dict(
    head_dim=20,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=6,
    linear_value_head_dim=10,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    num_experts=8,
    num_experts_per_tok=2,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 2, 1], mrope_interleaved=True
    ),
)

VISION: Config = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=20,
    num_heads=2,
    patch_size=4,
    out_hidden_size=32,
    num_position_embeddings=16,
)

MIXTRAL: Config = BASE | dict(
    intermediate_size=24, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
)

GPT_OSS: Config = BASE | dict(
    intermediate_size=24,
    num_hidden_layers=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=16,
    swiglu_limit=1.25,  # the real 7.0 would never clamp at this size
    swiglu_alpha=1.5,
    rope_parameters=dict(rope_type="yarn", rope_theta=1.5e5, factor=32.0, original_max_position_embeddings=4),
)

DEEPSEEK_V3: Config = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=3,
    topk_group=2,
    routed_scaling_factor=2.5,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    max_position_embeddings=128,
)

NEMOTRON_H: Config = BASE | dict(
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
    intermediate_size=40,
    mamba_num_heads=6,
    mamba_head_dim=6,
    n_groups=2,
    ssm_state_size=10,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=28,
    routed_scaling_factor=2.5,
)

MODELS: dict[str, Model] = {
    "qwen3_moe": Model("Qwen3MoeForCausalLM", QWEN3),
    "qwen3_5_moe": Model("Qwen3_5MoeForConditionalGeneration", dict(text_config=QWEN3_5, vision_config=VISION)),
    "qwen3_5_moe_text": Model("Qwen3_5MoeForCausalLM", QWEN3_5),
    "mixtral": Model("MixtralForCausalLM", MIXTRAL),
    "gpt_oss": Model("GptOssForCausalLM", GPT_OSS),
    "deepseek_v3": Model("DeepseekV3ForCausalLM", DEEPSEEK_V3),
    "nemotron_h": Model("NemotronHForCausalLM", NEMOTRON_H),
    "nemotron_h_latent": Model("NemotronHForCausalLM", NEMOTRON_H | dict(moe_latent_size=20)),
}

# What `save_pretrained` renames in the prefix of a MoE block, by config.model_type.
ON_DISK = {"mixtral": (".mlp", ".block_sparse_moe"), "nemotron_h": ("model.", "backbone.")}

# Step-3.7's module names and the Step-3.5 checkpoint tensors concatenated (on axis 1) in each.
STEP3P5_BLOCK = {
    "gate.weight": ["moe.gate.weight"],
    "gate.e_score_correction_bias": ["moe.router_bias"],
    "experts.gate_up_proj": ["moe.gate_proj.weight", "moe.up_proj.weight"],
    "experts.down_proj": ["moe.down_proj.weight"],
    "shared_experts.gate_proj.weight": ["share_expert.gate_proj.weight"],
    "shared_experts.up_proj.weight": ["share_expert.up_proj.weight"],
    "shared_experts.down_proj.weight": ["share_expert.down_proj.weight"],
}

OTHER_FILES = {
    "tokenizer.json": '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}\n',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}\n',
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """The tiny random model of `MODELS[name]`; `overrides` replace fields of its (text) config."""
    arch, config = copy.deepcopy(MODELS[name])
    config.get("text_config", config).update(overrides)
    cls = getattr(transformers, arch)
    model = cls._from_config(cls.config_class(**config), dtype=torch.float32, experts_implementation="eager").eval()
    randomise(model, seed)
    return cast(model, dtype)


def write(
    name: str,
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "100KB",
    seed: int = 0,
    save_original_format: bool = True,
    **overrides: Any,
) -> Any:
    """`build` the model and save it as Transformers does, with tokenizer files beside it."""
    model = build(name, dtype, seed, **overrides)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=save_original_format)
    for file, text in OTHER_FILES.items():
        (Path(path) / file).write_text(text)
    return model


def save(config: Config, tensors: dict[str, Tensor], path: Path | str, max_shard_size: str = "100KB") -> None:
    """Write any checkpoint as the Hub has it: shards, index, config.json and the tokenizer files."""
    Path(path).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, path, max_shard_size=max_shard_size)
    for file, text in (OTHER_FILES | {"config.json": json.dumps(config, indent=2) + "\n"}).items():
        (Path(path) / file).write_text(text)


def moe_blocks(model: Any, save_original_format: bool = True) -> list[tuple[str, nn.Module]]:
    """Every MoE block, with the prefix of its checkpoint keys as `save_pretrained` writes them."""
    old, new = ON_DISK.get(model.config.model_type, ("", "")) if save_original_format else ("", "")
    return [(name.replace(old, new, 1), m) for name, m in model.named_modules() if hasattr(m, "experts")]


def step3p5_blocks(config: Config, tensors: dict[str, Tensor]) -> list[tuple[str, nn.Module]]:
    """The MoE layers of a Step-3.5 checkpoint, in fp32, as modules of Step-3.7's text model, which is Step-3.5's."""
    from transformers.models.step3p7.modeling_step3p7 import Step3p7SparseMoeBlock

    text: Any = transformers.Step3p7Config(text_config=copy.deepcopy(config)).text_config
    layers = [l for l, kind in enumerate(text.mlp_layer_types) if kind == "sparse"]
    blocks: list[tuple[str, nn.Module]] = [
        (f"model.layers.{l}", Step3p7SparseMoeBlock(text, l).float().eval()) for l in layers
    ]
    for prefix, block in blocks:
        parts = {k: [tensors[f"{prefix}.{name}"].float() for name in names] for k, names in STEP3P5_BLOCK.items()}
        block.load_state_dict({k: torch.cat(p, dim=len(p) - 1) for k, p in parts.items()})
    return blocks


def forward(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output [B, S, D] alone: GPT-OSS returns its router scores too."""
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


def routing(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(indices [T, K], weights [T, K]) of the block's own router, T = B * S; DeepSeek's order within K is arbitrary."""
    router = block.gate if hasattr(block, "gate") else block.router
    _, weights, indices = router(x.flatten(0, -2))
    return indices, weights


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter and every saved buffer: norms and `D` around 1, all the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        around_one = tensor.ndim == 1 and ("norm" in name or name.endswith(".D"))
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.2 * noise if around_one else (0.3 if tensor.ndim == 1 else 0.2) * noise)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast as `from_pretrained(dtype=...)` does: strict fp32 parameters and unsaved buffers (rotary) stay fp32."""
    saved, strict = model.state_dict().keys(), model._get_dtype_plan(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and not any(part in strict for part in name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model
