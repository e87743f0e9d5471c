"""The gate of a router: tokens -> logits, and its parameters checked."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.shapes import all_tensors, check_config, check_level, check_params, computed_with, n_ranked, odd, said
from fmoe.types import INTEGERS, MoEConfig, Params

WEIGHTS = ("gate.weight", "gate.proj.weight")
"""What a gate's weight is called: one of these."""


def logits_of(
    params: Params, x: Tensor, config: MoEConfig, indices: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logits, correction bias, scale of each expert's weights)."""
    check_config("route", config)
    check_level("route", params, WEIGHTS)
    gate = {name: p for name, p in params.items() if name.startswith("gate.")}
    _check(dict(gate), x, config, {"indices": indices, "mask": mask})
    seen = x if mask is None else x.masked_fill(~mask[:, None], 0)
    check_chosen(gate.get("gate.tid2eid"), indices)
    weight = next(gate[name] for name in WEIGHTS if name in gate)
    kept = lambda t: t if t is None or config.train_gate else t.detach()
    if said(config, "router_norm"):
        seen = rms_norm(seen, kept(gate["gate.scale"]), config.norm_eps)
    logits = gate_logits(seen, weight, gate.get("gate.bias", gate.get("gate.proj.bias")), config)
    return logits, gate.get("gate.e_score_correction_bias"), kept(gate.get("gate.per_expert_scale"))


def check_chosen(table: Tensor | None, indices: Tensor | None) -> None:
    """Raises ValueError for a gate that has a table of experts by token id, and no indices from it."""
    if table is not None and indices is None:
        fix = "Fix: indices=params['gate.tid2eid'][token_ids]"
        raise ValueError(f"route: experts are chosen by 'gate.tid2eid', of token ids that are not here.\n{fix}")


def is_corrected(config: MoEConfig) -> bool:
    """Whether a config promises an `e_score_correction_bias`."""
    asked = config.force_e_score_correction_bias or config.gate_bias_update_factor > 0
    return asked or config.score_func.endswith("_with_bias")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 (fp64 stays), in x's dtype.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([0.8485, 2.2627])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor | None, config: MoEConfig) -> Tensor:
    """x @ weight^T + bias in the dtype that `route` takes logits in, scaled and softly capped as the config says.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1)
    >>> gate_logits(torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]]), None, config)
    tensor([[2., 6.]])
    """
    return scaled(bare_logits(x, weight, bias, config), config)


def bare_logits(x: Tensor, weight: Tensor, bias: Tensor | None, config: MoEConfig) -> Tensor:
    """x @ weight^T + bias in the dtype that `route` takes logits in."""
    _check_linear(x, weight, bias)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if config.score_func != "softmax":
        dtype = torch.promote_types(dtype, torch.float32)
    if not config.train_gate:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def scaled(logits: Tensor, config: MoEConfig) -> Tensor:
    """Logits times config's scale, softly capped as it says."""
    scale = said(config, "logit_scale") * (config.dim**-0.5 if said(config, "scaled_logits") else 1)
    logits, cap = logits if scale == 1 else logits * scale, said(config, "logit_softcap")
    return torch.tanh(logits / cap) * cap if cap else logits


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, t in given.items():
        computed_with("gate_logits", name, t)
    E, D = weight.shape if weight.ndim == 2 else (-1, -1)
    if not x.ndim or x.shape[-1] != D or (bias is not None and bias.shape != (E,)):
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
        raise ValueError(f"gate_logits: found {shapes}, expected x [T, D], weight [E, D] and bias [E] or None")
    if strange := odd(given, x.device):
        raise ValueError(f"gate_logits: {strange[0]}")


def check_tokens(owner: str, x: Tensor, config: MoEConfig, mask: Tensor | None) -> None:
    """Raises ValueError for what is no x [T, D] of numbers, or no mask bool [T] of it."""
    computed_with(owner, "x", x)
    if x.ndim != 2 or x.shape[1] != config.dim:
        raise ValueError(f"{owner}: x has shape {list(x.shape)}, expected [T, D={config.dim}]")
    check_mask(owner, mask, x)


def check_mask(owner: str, mask: Tensor | None, x: Tensor) -> None:
    """Raises ValueError for what is no mask bool [T] of x [T, ...]."""
    if mask is None:
        return
    all_tensors(owner, {"mask": mask}, "")
    if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"{owner}: mask is {mask.dtype} {list(mask.shape)}, expected torch.bool [T={x.shape[0]}]")


def _check(gate: dict[str, Tensor], x: Tensor, config: MoEConfig, given: dict[str, Tensor | None]) -> None:
    indices, mask = given["indices"], given["mask"]
    all_tensors("route", {"indices": indices} if indices is not None else {}, "")
    check_tokens("route", x, config, mask)
    T, K = x.shape[0], config.n_activated_experts
    if indices is not None and (indices.shape != (T, K) or indices.dtype not in INTEGERS):
        raise ValueError(f"route: indices are {indices.dtype} {list(indices.shape)}, expected integer [T={T}, K={K}]")
    if strange := odd({name: t for name, t in given.items() if t is not None}, x.device):
        raise ValueError("\n".join(f"route: {told}" for told in strange))
    weight = next((name for name in WEIGHTS if name in gate), WEIGHTS[0])
    bias = weight.replace("weight", "bias")
    axes = {weight: "E D", bias: "E", "gate.e_score_correction_bias": "E"}
    normed = {"gate.scale": "D", "gate.per_expert_scale": "E"}
    axes |= normed if said(config, "router_norm") else {}
    promised = {
        bias: config.router_bias,
        "gate.e_score_correction_bias": is_corrected(config),
    }
    sizes = {"E": n_ranked(config), "D": config.dim}
    optional = [name for name, asked in promised.items() if not asked]
    if (table := gate.pop("gate.tid2eid", None)) is not None and table.dtype not in INTEGERS:
        raise ValueError(f"route: 'gate.tid2eid' is {table.dtype}, expected integers")
    check_params("route", gate, axes, sizes, where=x.device, optional=optional)
