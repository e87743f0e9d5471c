"""Small checkpoints as dicts of files, for tests that lay a great many of them, and spoil them.

    path = lay(bases()["qwen3_moe"], tmp_path / "source")

A thing that is no file is a function which makes it at a path.
"""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hf_synthetic as synthetic
import torch
from safetensors.torch import save
from torch import Tensor

import fmoe
from fmoe.layout.entries import walk
from fmoe.layout.notation import Rule


def _axes(kind: fmoe.families.Family) -> frozenset[Any]:
    """How a family's tensors lie, whatever their names."""
    rules = [e for stage in kind.rules.stages for e in walk(stage.entries) if isinstance(e, Rule) and e.source.axes]
    return frozenset((r.source.axes, r.target.axes, r.stacked) for r in rules)


TWO_TOWERS = ("dots3_note", "ernie4_5_vl_moe")
FAMILIES = {
    _axes(kind): name
    for name, kind in reversed(fmoe.families.FAMILIES.items())
    if kind.model_types[0] not in TWO_TOWERS
}
FAMILIES = list(FAMILIES.values())
"""Model types, one of all those whose tensors lie alike; what has two towers takes long to draw, and is in OTHERS."""
OTHERS = list({kind.rules: name for name, kind in fmoe.families.FAMILIES.items() if name not in FAMILIES}.values())
"""The rest, one of all those that share their rules."""
CHOICES: dict[str, dict[str, str]] = {"qwen3_vl_moe": dict(layout="fused")}
"""Told by hand where names say nothing."""


INDEX, NATIVE, CONFIG = "model.safetensors.index.json", "fmoe.json", "config.json"
Files = dict[str, bytes | Callable[[Path], object]]

QWEN3 = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_size": 4,
    "moe_intermediate_size": 3,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}
TINY: dict[str, Any] = dict(vocab_size=5, hidden_size=8, intermediate_size=6, moe_intermediate_size=4, q_lora_rank=3)
TINY |= dict(kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=3, num_attention_heads=2)
TINY |= dict(n_routed_experts=2, num_hidden_layers=2)


def _qwen3(fused: bool) -> dict[str, Tensor]:
    D, I, E = QWEN3["hidden_size"], QWEN3["moe_intermediate_size"], QWEN3["num_experts"]
    made = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=made).view(torch.bfloat16)
    tensors = {"model.embed_tokens.weight": noise(5, D), "model.norm.weight": noise(D), "model.scalar": noise(1)[0]}
    for block in (f"model.layers.{l}.mlp" for l in range(QWEN3["num_hidden_layers"])):
        tensors[f"{block}.gate.weight"] = noise(E, D).float()
        if fused:
            tensors |= {f"{block}.experts.gate_up_proj": noise(E, 2 * I, D)}
            tensors |= {f"{block}.experts.down_proj": noise(E, D, I)}
            continue
        for e in range(E):
            tensors |= {f"{block}.experts.{e}.{p}_proj.weight": noise(I, D) for p in ("gate", "up")}
            tensors |= {f"{block}.experts.{e}.down_proj.weight": noise(D, I)}
    return tensors


@cache
def bases() -> dict[str, Files]:
    """One by one in two shards; fused in one file without an index; FP8; and the first as a native directory."""
    qwen3, fused = _qwen3(False), _qwen3(True)
    config, fp8 = synthetic.deepseek_v3_fp8(**TINY)
    found: dict[str, Files] = {
        "qwen3_moe": _sharded(QWEN3, qwen3),
        "fused": {CONFIG: json.dumps(QWEN3).encode(), "model.safetensors": save(fused, {"format": "pt"})},
        "fp8": {CONFIG: json.dumps(config).encode(), "model.safetensors": save(fp8)},
    }
    with tempfile.TemporaryDirectory() as folder:
        lay(found["qwen3_moe"], Path(folder) / "hf")
        fmoe.convert(Path(folder) / "hf", Path(folder) / "native", max_shard_size=400)
        found["native"] = {p.name: p.read_bytes() for p in sorted((Path(folder) / "native").iterdir())}
    return found


def _sharded(config: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    names = list(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    files: Files = {CONFIG: json.dumps(config).encode(), INDEX: json.dumps(index).encode(), "tokenizer.json": b"{}"}
    return files | {file: save({n: tensors[n] for n in held}, {"format": "pt"}) for file, held in shards.items()}


def lay(files: Files, path: Path) -> Path:
    """The directory that files describe, at path."""
    path.mkdir(parents=True)
    for name, content in files.items():
        try:
            content(path / name) if callable(content) else (path / name).write_bytes(content)
        except (OSError, ValueError):
            continue  # a name that no file can have
    return path
