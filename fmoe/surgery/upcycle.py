"""A dense checkpoint as a sparse one: every MLP copied into experts, a router drawn."""

import re
from collections.abc import Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor

from fmoe.surgery.config import as_given
from fmoe.types import Params, brief

MLP = re.compile(r"(.*layers\.\d+\.mlp)\.(gate|up|down)_proj\.(\w+)")
# what a config that does not say so means, where the sparse architecture's class would mean something else
_COMMON = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, hidden_act="silu", initializer_range=0.02)
DENSE: dict[str, dict[str, Any]] = {
    "llama": _COMMON | dict(max_position_embeddings=2048, sliding_window=None),
    "mistral": _COMMON | dict(max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    "qwen3": _COMMON | dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
}
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": dict(architectures=["MixtralForCausalLM"]),
    "qwen3_moe": dict(
        architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]
    ),
}


def upcycle(
    native: Params,
    config: Any,
    n_experts: int,
    n_activated: int,
    to: str = "mixtral",
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A Mistral, Llama or Qwen3 checkpoint with every MLP as n_experts equal experts: at first the same output.

    native: the dense model's tensors under Hugging Face's names. config: its config. to: "mixtral", or "qwen3_moe" for
    Qwen3 (the other two lack its norms of q and k, Mixtral has none). Routing weights sum to 1 there, so equal experts
    give what the MLP gave. The gate is drawn from Normal(0, config.initializer_range), in the MLP's dtype.
    Returns native tensors of the family `to`, and its config.

    Raises ValueError for another model, for biases in attention or MLP, and for impossible numbers.

    >>> dense = {f"model.layers.0.mlp.{n}_proj.weight": torch.ones(3, 2) for n in ("gate", "up")}
    >>> dense |= {"model.layers.0.mlp.down_proj.weight": torch.ones(2, 3), "model.norm.weight": torch.ones(2)}
    >>> config = dict(model_type="mistral", hidden_size=2, intermediate_size=3, num_attention_heads=1)
    >>> native, config = upcycle(dense, config, n_experts=4, n_activated=2)
    >>> {name: list(t.shape) for name, t in native.items() if "gate" in name}
    {'model.layers.0.mlp.gate.weight': [4, 2], 'model.layers.0.mlp.experts.gate_and_up_projs': [4, 2, 6]}
    >>> config["num_local_experts"], config["model_type"]
    (4, 'mixtral')
    """
    given, n_experts, n_activated = as_given(config), index(n_experts), index(n_activated)  # plain in the config
    _check(native, given, n_experts, n_activated, to)
    given = DENSE[given["model_type"]] | {n: v for n, v in given.items() if v is not None or n in ("sliding_window",)}
    if "rope_parameters" not in given:
        given.setdefault("rope_theta", 10000.0)
    out: dict[str, Tensor] = {}
    for name, t in native.items():
        match = MLP.fullmatch(name)
        if match is None:
            out[name] = t
        elif match[2] == "down":
            gate, up = (native[f"{match[1]}.{part}_proj.weight"] for part in ("gate", "up"))
            row = torch.empty(n_experts, t.shape[0], dtype=torch.float32, device=t.device)
            row.normal_(0.0, given["initializer_range"], generator=generator)
            out[f"{match[1]}.gate.weight"] = row.to(t.dtype)
            out[f"{match[1]}.experts.gate_and_up_projs"] = _copies(torch.cat([gate, up]), n_experts)
            out[f"{match[1]}.experts.down_projs"] = _copies(t, n_experts)
    sizes = dict(num_experts_per_tok=n_activated, model_type=to)
    sizes |= dict(num_local_experts=n_experts) if to == "mixtral" else dict(num_experts=n_experts)
    if to == "qwen3_moe":
        sizes["moe_intermediate_size"] = given["intermediate_size"]
    return out, given | SPARSE[to] | sizes


def _copies(w: Tensor, E: int) -> Tensor:
    """w [out, in] as [E, in, out], stored as Hugging Face stores it."""
    return w.expand(E, *w.shape).clone(memory_format=torch.contiguous_format).mT


def _check(native: Params, config: Mapping[str, Any], n_experts: int, n_activated: int, to: str) -> None:
    source = config.get("model_type")
    if to not in SPARSE or source not in DENSE:
        told = f"of {', '.join(DENSE)} to {', '.join(SPARSE)}"
        raise ValueError(f"upcycle: {source!r} to {to!r}, expected a checkpoint {told}")
    if not 1 <= n_activated <= n_experts < 2**31:
        told = f"n_activated={brief(n_activated)} of n_experts={brief(n_experts)}"
        raise ValueError(f"upcycle: {told}, expected 1 <= K <= E")
    if config.get("quantization_config"):
        raise ValueError("upcycle: config has a quantization_config, expected weights that are decoded")
    if (source == "qwen3") != (to == "qwen3_moe"):
        raise ValueError(f"upcycle: {source} to {to}: norms of q and k would be lost or missing: choose the other")
    if odd := [n for n in native if n.endswith(("_proj.bias", "_proj.weight_scale_inv"))]:
        raise ValueError(f"upcycle: {odd[0]!r}: {to} has no such tensor")
    found = {match.groups()[:2] for match in map(MLP.fullmatch, native) if match}
    layers = {layer for layer, _ in found}
    if not layers or len(found) != 3 * len(layers):
        raise ValueError("upcycle: expected gate_proj, up_proj and down_proj under 'layers.{l}.mlp.' of every layer")
