"""`fmoe demo`: the main job from end to end on a small checkpoint that it writes itself: no network, no models."""

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmoe import checkpoint
from fmoe.backends import BACKENDS
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.layer.experts import experts
from fmoe.routing import route
from fmoe.types import AdapterError, MoEConfig, human, subtree

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "dtype": "float32",
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "hidden_act": "silu",
    "norm_topk_prob": True,
}


def run(keep: Path | None, say: Callable[[str], object]) -> dict[str, Any]:
    """Write, convert, run forward and backward on every backend, convert back, compare: what was found, as a dict.

    Raises AdapterError where anything differs, or where keep is there and is not an empty directory.
    """
    if keep and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise AdapterError(f"{keep} is there and is not an empty directory: name another")
    with nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory(prefix="fmoe-demo-") as folder:
        hf, native, back = (Path(folder) / name for name in ("hf", "native", "back"))
        write(hf)
        made = checkpoint.convert(hf, native)
        say(f"converted  {made.tensors} HF tensors -> {made.made} native ones, {human(made.nbytes)}")
        opened = checkpoint.open_checkpoint(native)
        losses = {name: _losses(opened, made.adapter.moe_config, name) for name in BACKENDS}
        for name, (loss, again) in losses.items():
            say(f"experts    backend {name}: loss {loss:.6f}, after one step down the gradient {again:.6f}")
            if not again < loss:
                raise AdapterError(f"backend {name}: a step down the gradient took the loss from {loss} to {again}")
        checkpoint.convert(native, back, "hf")
        same = [path.name for path in sorted(hf.iterdir()) if (back / path.name).read_bytes() == path.read_bytes()]
        if len(same) < len(list(hf.iterdir())):
            raise AdapterError(f"only {same} came back the same")
        say(f"restored   {', '.join(same)}: byte for byte the files that were converted")
        if keep:
            say(f"left in    {keep}")
    return {
        "tensors": made.tensors,
        "native": made.made,
        "losses": {n: list(v) for n, v in losses.items()},
        "files": same,
    }


def write(path: Path) -> None:
    """A Qwen3-MoE checkpoint in two files, as Hugging Face stores them."""
    path.mkdir(parents=True, exist_ok=True)
    made = torch.Generator().manual_seed(0)
    D, I, E = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["num_experts"]
    normal = lambda *shape: torch.randn(shape, generator=made) / shape[-1] ** 0.5
    weight_map: dict[str, str] = {}
    total = 0
    for l in range(CONFIG["num_hidden_layers"]):
        block, file = f"model.layers.{l}.mlp.", f"model-{l + 1:05d}-of-00002.safetensors"
        tensors = {f"{block}gate.weight": normal(E, D), f"model.layers.{l}.post_attention_layernorm.weight": normal(D)}
        for e in range(E):
            shapes = {"gate": (I, D), "up": (I, D), "down": (D, I)}
            tensors |= {f"{block}experts.{e}.{g}_proj.weight": normal(*shape) for g, shape in shapes.items()}
        save_file(tensors, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (path / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def _losses(native: Checkpoint, config: MoEConfig, backend: str) -> tuple[float, float]:
    """The loss of the first layer, and the loss after one step down its gradient."""
    params = subtree(native.read(n for n in native.specs if n.startswith("model.layers.0.mlp.")), "model.layers.0.mlp")
    x = torch.randn(16, config.dim, generator=torch.Generator().manual_seed(1))
    routing, weights = route(params, x, config), subtree(params, "experts")

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (experts(weights, x, routing, config, backend=backend) - x).square().mean()

    grads, value = torch.func.grad_and_value(loss)(weights)
    return float(value), float(loss({n: w - grads[n] for n, w in weights.items()}))
