"""Top-k routers as pure functions: logits -> scores -> the K best experts -> weights.

Selection sees the correction bias and the groups; weights are the scores of what was selected. Selection passes no
gradient, weights do. The seed treated an unknown score function as "sigmoid"; here it is an error.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.shapes import check_params
from fmoe.types import MoEConfig, Params, Routing


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    # at 0 the root's slope is infinite, and the slope of an expert that is not selected is multiplied by 0
    return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "softmax_with_bias": _softmax,
    "sigmoid": torch.sigmoid,
    "sigmoid_with_bias": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}


def route(params: Params, x: Tensor, config: MoEConfig) -> Routing:
    """topk_routing(x @ gate.weight^T + gate.bias), weights in x's dtype (fp32 if `config.router_weights_fp32`).

    x [T, D] with D = config.dim. params: `gate.weight` [E, D]; `gate.bias` [E] and `gate.e_score_correction_bias` [E]
    where the config asks for them, or where they are present. Names that do not start with "gate." are left alone.
    "softmax" logits are taken in the wider dtype of x and gate.weight, all others at least in fp32, as Transformers
    does. Raises ValueError for unknown, missing and misshapen parameters, and as `topk_routing`.

    >>> config = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=2, moe_inter_dim=4)
    >>> route({"gate.weight": torch.tensor([[1.0, 0], [0, 1], [2, 0]])}, torch.tensor([[1.0, 1.5]]), config)
    Routing(indices=tensor([[2, 1]]), weights=tensor([[0.6225, 0.3775]]), mask=None)
    """
    gate = {name: p for name, p in params.items() if name.startswith("gate.")}
    _check(gate, x, config)
    weight, correction = gate["gate.weight"], gate.get("gate.e_score_correction_bias")
    logits = gate_logits(x, weight, gate.get("gate.bias"), config)
    return routing_of(logits, x.dtype, config, correction)


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor | None, config: MoEConfig) -> Tensor:
    """x @ weight^T + bias in the dtype that `route` takes logits in."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if config.score_func != "softmax":
        dtype = torch.promote_types(dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def routing_of(logits: Tensor, dtype: torch.dtype, config: MoEConfig, correction: Tensor | None) -> Routing:
    """`topk_routing`, weights in the dtype of x (fp32 if `config.router_weights_fp32`)."""
    routing = topk_routing(logits, config, correction)
    out = torch.promote_types(dtype, torch.float32) if config.router_weights_fp32 else dtype
    return routing._replace(weights=routing.weights.to(out))


def topk_routing(logits: Tensor, config: MoEConfig, correction_bias: Tensor | None = None) -> Routing:
    """indices[t] = the K best of score(logits[t]) + correction_bias; weights[t] = the scores there, without that bias.

    logits [T, E]; correction_bias [E] or None. Everything is computed and returned in fp32 (fp64 stays).
    `config.score_func` names the score, see `SCORES`; "softmax" is taken over the K selected logits unless
    `softmax_before_topk`. With `n_expert_groups` > 1 only the best `n_limited_groups` groups of neighbouring experts
    take part, a group being worth its two best biased scores (DeepSeek-V3) or, without correction bias, its best one
    (DeepSeek-V2). `norm_topk_prob` divides weights by their sum + 1e-20, then `route_scale` multiplies them.
    Raises ValueError for an unknown score function, impossible groups, K > E, or a correction bias that the score
    function does not take ("softmax") or lacks ("softmax_with_bias", "sigmoid_with_bias").

    >>> config = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=2, moe_inter_dim=4, score_func="sigmoid")
    >>> topk_routing(torch.tensor([[0.0, 1.0, 2.0]]), config, torch.tensor([9.0, 0.0, 0.0]))
    Routing(indices=tensor([[0, 2]]), weights=tensor([[0.5000, 0.8808]]), mask=None)
    """
    _check_choice(logits, config, correction_bias)
    after = config.score_func == "softmax" and not config.softmax_before_topk
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits if after else SCORES[config.score_func](logits)
    biased = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
    best_of = 1 if correction_bias is None else 2
    indices = _in_best_groups(biased.detach(), config, best_of).topk(config.n_activated_experts, -1).indices
    weights = (biased if config.router_weight_uses_score_correction_bias else scores).gather(-1, indices)
    if after:
        weights = weights.softmax(-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(indices, weights * config.route_scale)


def _in_best_groups(scores: Tensor, config: MoEConfig, best_of: int) -> Tensor:
    """scores [T, E] where the expert's group is one of the best, -inf elsewhere; a group is the sum of its best."""
    if config.n_expert_groups <= 1:
        return scores
    # -inf, not 0 as in the seed: a biased score may be negative, and a loser must not beat it
    groups = scores.unflatten(-1, (config.n_expert_groups, -1))
    worth = groups.topk(min(best_of, groups.shape[-1]), -1).values.sum(-1)
    best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(config.n_limited_groups, -1).indices, True)
    return groups.masked_fill(~best[..., None], -torch.inf).flatten(-2)


def _check(gate: Params, x: Tensor, config: MoEConfig) -> None:
    if x.ndim != 2 or x.shape[1] != config.dim:
        raise ValueError(f"route: x has shape {list(x.shape)}, expected [T, D={config.dim}]")
    axes = {"gate.weight": "E D", "gate.bias": "E", "gate.e_score_correction_bias": "E"}
    corrected = config.force_e_score_correction_bias or config.gate_bias_update_factor > 0
    corrected = corrected or config.score_func.endswith("_with_bias")
    promised = {"gate.bias": config.router_bias, "gate.e_score_correction_bias": corrected}
    sizes = {"E": config.n_routed_experts, "D": config.dim}
    check_params("route", gate, axes, sizes, optional=[name for name, asked in promised.items() if not asked])


def _check_choice(logits: Tensor, config: MoEConfig, correction_bias: Tensor | None) -> None:
    E, K = config.n_routed_experts, config.n_activated_experts
    G, g = config.n_expert_groups, config.n_limited_groups
    name = config.score_func
    if name not in SCORES:
        raise ValueError(f"score_func is {name!r}, expected one of {', '.join(SCORES)}")
    if logits.shape[-1] != E or K > E:
        raise ValueError(f"logits have shape {list(logits.shape)}, expected [T, E={E}] with E >= K={K}")
    if correction_bias is not None and name == "softmax":
        raise ValueError("score_func 'softmax' takes no e_score_correction_bias, expected 'softmax_with_bias'")
    if correction_bias is None and name.endswith("_with_bias"):
        raise ValueError(f"score_func {name!r} needs an e_score_correction_bias [E={E}], found none")
    if G > 1 and (E % G or not 1 <= g <= G or g * (E // G) < K):
        raise ValueError(
            f"n_expert_groups={G}, n_limited_groups={g}: expected G to divide E={E}, and g of G groups to hold K={K}"
        )
