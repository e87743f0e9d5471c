"""A layer of experts on a CPU where nobody listens, in the least steps: the host knows how many rows there are."""

from typing import NamedTuple

import torch
from torch import Tensor

from fmoe.activations import activation
from fmoe.backends.raw.loop import multiply
from fmoe.types import MoEConfig, Params, Routing

FEW = 16
"""Slots that the host orders; of more, torch sorts faster."""


class _Order(NamedTuple):
    """Row n is of slot[n] = t K + k, of token[n] = t; slot s has row back[s]; sizes: rows of each expert with any."""

    slot: Tensor
    token: Tensor
    back: Tensor
    sizes: dict[int, int]


def direct(params: Params, x: Tensor, routing: Routing, config: MoEConfig) -> Tensor | None:
    """y of `fmoe.experts`, not rounded to x's dtype, or None where a slot goes nowhere.

    The steps of the dispatcher `local` and the backend `loop`, in their order: bit for bit their result. Parameters
    without LoRA, plain tensors of which none requires a gradient that is recorded.

    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> routing = Routing(torch.tensor([[1], [0]]), torch.tensor([[0.5], [1.0]]))
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> direct(params, torch.tensor([[3.0], [2.0]]), routing, config).flatten().tolist()
    [45.0, 4.0]
    """
    indices, weights, mask = routing
    T, K = indices.shape
    order = None if mask is not None else _order(indices, config.n_routed_experts)
    if order is None:
        return None
    slot, token, back, sizes = order
    rows = x.index_select(0, token)
    wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    w = weights.flatten().index_select(0, slot).to(wide)[:, None]
    act, after = activation(config), config.apply_router_weight_after_down

    def biased(out: Tensor, name: str, w: Tensor | None = None) -> Tensor:
        if name not in params:
            return out
        bias = params[name].index_select(0, indices.flatten().index_select(0, slot)).to(x.dtype)
        return out + (bias if w is None else w * bias.to(w.dtype))

    u = biased(multiply(rows, params["gate_and_up_projs"], sizes), "gate_up_proj_bias")
    out = multiply(act(u, None if after else w), params["down_projs"], sizes)
    if after:
        out = w * biased(out, "down_proj_bias").to(w.dtype)
    else:
        out = biased(out.to(w.dtype), "down_proj_bias", w)
    out = out.index_select(0, back)
    return out if K == 1 else out.view(T, K, -1).sum(1)


def _order(indices: Tensor, E: int) -> _Order | None:
    """The slots of indices [T, K], sorted by expert and otherwise in order; None where one goes nowhere, or of none.

    >>> _order(torch.tensor([[1, 0], [1, 1]]), 2)[1:]
    (tensor([0, 0, 1, 1]), tensor([1, 0, 2, 3]), {0: 1, 1: 3})
    """
    K, N = indices.shape[1], indices.numel()
    if N > FEW:
        ids, slot = indices.flatten().sort(stable=True)
        if ids[0] < 0 or ids[-1] >= E:
            return None
        back = torch.empty_like(slot).scatter_(0, slot, torch.arange(N))
        return _Order(slot, slot // K, back, {e: n for e, n in enumerate(torch.bincount(ids).tolist()) if n})
    told = indices.flatten().tolist()
    slots = sorted(range(N), key=told.__getitem__)
    if not N or told[slots[0]] < 0 or told[slots[-1]] >= E:
        return None
    sizes: dict[int, int] = {}
    rows = [0] * N
    for row, at in enumerate(slots):
        sizes[told[at]] = sizes.get(told[at], 0) + 1
        rows[at] = row
    slot, token, back = torch.tensor([slots, [at // K for at in slots], rows]).unbind()
    return _Order(slot, token, back, sizes)
