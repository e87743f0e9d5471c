"""Top-k routers: logits -> scores -> the K best experts -> weights.

Selection sees the correction bias and the groups; weights are the scores of what was selected. Selection passes no
gradient, weights do. The seed treated an unknown score function as "sigmoid"; here it is an error.
"""

import torch
from torch import Tensor

from fmoe.folding import meant
from fmoe.routing.gate import check_mask, logits_of
from fmoe.routing.scores import BEFORE_TOPK, SCORES, Score
from fmoe.routing.usage import counts_of
from fmoe.shapes import all_tensors, check_config, computed_with, n_ranked, odd, said
from fmoe.types import INTEGERS, MoEConfig, Params, Routed, Routing


def route(
    params: Params, x: Tensor, config: MoEConfig, *, indices: Tensor | None = None, mask: Tensor | None = None
) -> Routing:
    """topk_routing(x @ gate.weight^T + gate.bias), weights in x's dtype (fp32 if `config.router_weights_fp32`).

    x [T, D] with D = config.dim. params: `gate.weight` [E, D] (or `gate.proj.weight`, Gemma 4's name); `gate.bias` [E]
    and `gate.e_score_correction_bias` [E] where the config asks for them, or where they are present; `gate.scale` [D]
    and `gate.per_expert_scale` [E] with `config.router_norm`. Names that do not start with "gate." are left alone.
    With `config.n_zero_experts` Z, E here is E + Z: ids from E on are zero experts. A gate that chooses by token id
    (`gate.tid2eid`, DeepSeek-V4's first layers) takes `indices=params["gate.tid2eid"][token_ids]`.
    "softmax" logits are taken in the wider dtype of x and gate.weight, all others at least in fp32, as Transformers
    does. `train_gate=False` in config: no gradient reaches the gate's parameters; x gets its own.

    indices [T, K], any integer dtype: the experts that were chosen before. Nothing is selected, and the weights are
    what this gate gives those experts, exactly as if it had selected them. A slot outside [0, E), such as -1, weighs 0
    and takes no part in normalisation. mask [T] bool: a token whose mask is False goes nowhere, and nothing of it, not
    even a NaN, reaches a gradient.

    Raises ValueError for unknown, missing and misshapen parameters, and as `topk_routing`.

    >>> config = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=2, moe_inter_dim=4)
    >>> params, x = {"gate.weight": torch.tensor([[1.0, 0], [0, 1], [2, 0]])}, torch.tensor([[1.0, 1.5]])
    >>> route(params, x, config)
    Routing(indices=tensor([[2, 1]]), weights=tensor([[0.6225, 0.3775]]), mask=None)
    >>> route(params, x, config, indices=torch.tensor([[0, -1]])).weights
    tensor([[1., 0.]])
    """
    logits, correction, scale = logits_of(params, x, config, indices, mask)
    routing = routing_of(logits, x.dtype, config, correction, indices, scale)
    return routing._replace(mask=mask)


def routed(
    params: Params, x: Tensor, config: MoEConfig, *, indices: Tensor | None = None, mask: Tensor | None = None
) -> Routed:
    """`route`, with the logits, the scores and the counts.

    >>> config = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=2, moe_inter_dim=4)
    >>> found = routed({"gate.weight": torch.tensor([[1.0, 0], [0, 1], [2, 0]])}, torch.tensor([[1.0, 1.5]]), config)
    >>> found.logits.tolist(), found.counts.tolist()
    ([[1.0, 1.5, 2.0]], [0, 1, 1])
    """
    logits, correction, scale = logits_of(params, x, config, indices, mask)
    return routed_of(logits, x.dtype, config, correction, indices, mask, scale)


def routing_of(
    logits: Tensor,
    dtype: torch.dtype,
    config: MoEConfig,
    correction: Tensor | None,
    indices: Tensor | None = None,
    scale: Tensor | None = None,
) -> Routing:
    """`topk_routing`, weights in the dtype of x (fp32 if `config.router_weights_fp32`), times scale [E] of the experts.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1)
    >>> routing_of(torch.tensor([[2.0, 6.0]]), torch.float32, config, None).indices
    tensor([[1]])
    """
    routing = topk_routing(logits, config, correction, indices)
    if scale is not None:
        if scale.shape != (n_ranked(config),) or (strange := odd({"scale": scale}, logits.device)):
            told = f"is {list(scale.shape)}" if scale.shape != (n_ranked(config),) else strange[0]
            raise ValueError(f"routing_of: scale {told}, expected [E={n_ranked(config)}], where logits are")
        at = routing.indices.clamp(0, len(scale) - 1)  # a slot that goes nowhere weighs 0, whatever its scale
        routing = routing._replace(weights=routing.weights * scale[at].to(routing.weights.dtype))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"routing_of: dtype is of type {type(dtype).__name__}, expected x's, a torch.dtype")
    out = torch.promote_types(dtype, torch.float32) if config.router_weights_fp32 else dtype
    return routing._replace(weights=routing.weights.to(out))


def routed_of(
    logits: Tensor,
    dtype: torch.dtype,
    config: MoEConfig,
    correction: Tensor | None,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
) -> Routed:
    """The Routed of logits [T, E] that a gate has made of x of this dtype.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1)
    >>> routed_of(torch.tensor([[2.0, 6.0], [1.0, 0.0]]), torch.float32, config, None).counts
    tensor([1, 1])
    """
    routing = routing_of(logits, dtype, config, correction, indices, scale)._replace(mask=mask)
    check_mask("routed_of", mask, logits)
    return Routed(routing, logits, score_of(config).rank(_wide(logits)), counts_of(routing, n_ranked(config)))


def topk_routing(
    logits: Tensor, config: MoEConfig, correction_bias: Tensor | None = None, indices: Tensor | None = None
) -> Routing:
    """indices[t] = the K best of score(logits[t]) + correction_bias; weights[t] = the scores there, without that bias.

    logits [T, E]; correction_bias [E] or None; indices: as in `route`. Everything is computed and returned in fp32
    (fp64 stays; with `router_weights_fp32` selection ranks in fp32 all the same). `config.score_func` names the score,
    see `SCORES`; "softmax" is taken over the K selected logits unless `softmax_before_topk`. With `n_expert_groups` > 1
    only the best `n_limited_groups` groups of neighbouring experts take part, a group being worth its two best biased
    scores (DeepSeek-V3) or, without correction bias, its best one (DeepSeek-V2). `norm_topk_prob` divides weights by
    max(their sum + `norm_topk_eps`, `norm_topk_min`), then `route_scale` multiplies them.
    Raises ValueError for an unknown score function, impossible groups, K > E, or a correction bias that the score
    function does not take ("softmax") or lacks ("softmax_with_bias", "sigmoid_with_bias").

    >>> config = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=2, moe_inter_dim=4, score_func="sigmoid")
    >>> topk_routing(torch.tensor([[0.0, 1.0, 2.0]]), config, torch.tensor([9.0, 0.0, 0.0]))
    Routing(indices=tensor([[0, 2]]), weights=tensor([[0.5000, 0.8808]]), mask=None)
    """
    _check_choice(logits, config, correction_bias)
    _check_given(logits, correction_bias, indices)
    score = score_of(config)
    scores = score.rank(_wide(logits))
    biased = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
    if indices is None:
        best_of = score.group_of or (1 if correction_bias is None else 2)
        ranked = biased.detach()
        if config.router_weights_fp32 and ranked.dtype == torch.float64:
            # where such a router saturates, experts are equal in fp32: of these it takes the first, whatever x is
            ranked = score.rank(logits.detach().float())
            ranked = ranked if correction_bias is None else ranked + correction_bias.detach().float()
        indices = _in_best_groups(ranked, config, best_of, score.loser).topk(config.n_activated_experts, -1).indices
        gone = None
    else:
        indices = indices.long()
        gone = (indices < 0) | (indices >= n_ranked(config))
    at = indices if gone is None else indices.masked_fill(gone, 0)
    told = biased if config.router_weight_uses_score_correction_bias else scores
    weights = told.gather(-1, at)
    if score.mix is not None:
        weights = score.mix(told, at, at != indices, config)
    if score.weigh is not None:
        # the least number, not -inf, of which a softmax of nothing else would make NaN
        weights = score.weigh(weights if gone is None else weights.masked_fill(gone, torch.finfo(weights.dtype).min))
    if gone is not None:
        weights = weights.masked_fill(gone, 0)
    if config.norm_topk_prob:
        weights = weights / _total(weights, config)
    return Routing(indices, weights * config.route_scale)


def score_of(config: MoEConfig) -> Score:
    """The row of `SCORES` that a config names. Raises ValueError for an unknown name."""
    check_config("routing", config)
    if config.score_func not in SCORES:
        told = f"{', '.join(SCORES)}{meant(config.score_func, SCORES)}"
        raise ValueError(f"score_func is {config.score_func!r}, expected one of {told}")
    before = config.score_func == "softmax" and config.softmax_before_topk
    return BEFORE_TOPK if before else SCORES[config.score_func]


def _total(weights: Tensor, config: MoEConfig) -> Tensor:
    """What normalisation divides by; 1 where nothing is chosen, or all of it weighs 0."""
    total = weights.sum(-1, keepdim=True) + said(config, "norm_topk_eps")
    least = said(config, "norm_topk_min")
    total = total.clamp(min=least) if least else total  # of biased scores a sum may be negative
    return total.masked_fill(total == 0, 1)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _in_best_groups(scores: Tensor, config: MoEConfig, best_of: int, loser: float) -> Tensor:
    """scores [T, E] where the expert's group is one of the best, `loser` elsewhere; a group is the sum of its best."""
    if config.n_expert_groups <= 1:
        return scores
    # mostly -inf, not 0 as in the seed: a biased score may be negative, and a loser must not beat it
    groups = scores.unflatten(-1, (config.n_expert_groups, -1))
    worth = groups.topk(min(best_of, groups.shape[-1]), -1).values.sum(-1)
    best = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(config.n_limited_groups, -1).indices, True)
    return groups.masked_fill(~best[..., None], loser).flatten(-2)


def _check_given(logits: Tensor, bias: Tensor | None, indices: Tensor | None) -> None:
    """Whether what else is given goes with logits [T, E]."""
    *T, E = logits.shape
    if bias is not None:
        computed_with("topk_routing", "correction_bias", bias)
        if bias.shape != (E,):
            raise ValueError(f"topk_routing: correction_bias is {list(bias.shape)}, expected [E={E}]")
    if indices is not None:
        all_tensors("topk_routing", {"indices": indices}, "")
        if not indices.ndim or [*indices.shape[:-1]] != T or indices.dtype not in INTEGERS:
            told = f"{indices.dtype} {list(indices.shape)}, expected integer {[*T, 'K']}"
            raise ValueError(f"topk_routing: indices are {told}, for logits {[*T, E]}")
    given = {"correction_bias": bias, "indices": indices}
    if strange := odd({name: t for name, t in given.items() if t is not None}, logits.device):
        raise ValueError(f"topk_routing: {strange[0].replace('where x is', 'where logits are')}")


def _check_choice(logits: Tensor, config: MoEConfig, correction_bias: Tensor | None) -> None:
    score, name = score_of(config), config.score_func
    E, K = n_ranked(config), config.n_activated_experts
    G, g = config.n_expert_groups, config.n_limited_groups
    computed_with("topk_routing", "logits", logits)
    if not logits.ndim or logits.shape[-1] != E or K > E:
        raise ValueError(f"logits have shape {list(logits.shape)}, expected [T, E={E}] with E >= K={K}")
    if correction_bias is not None and score.bias == "none":
        raise ValueError(f"score_func {name!r} takes no e_score_correction_bias, expected 'softmax_with_bias'")
    if correction_bias is None and score.bias == "needed":
        raise ValueError(f"score_func {name!r} needs an e_score_correction_bias [E={E}], found none")
    if G > 1 and (E % G or not 1 <= g <= G or g * (E // G) < K):
        raise ValueError(
            f"n_expert_groups={G}, n_limited_groups={g}: expected G to divide E={E}, and g of G groups to hold K={K}"
        )
    if G <= 1 < g:
        raise ValueError(f"n_expert_groups={G}, n_limited_groups={g}: expected 1 of 1 group, as without groups")
