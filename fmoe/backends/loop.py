"""The reference backend: one expert after the other, plain torch. Every other backend must agree with it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.activations import activation
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

Maybe = Tensor | None
Act = Callable[[Tensor, Maybe], Tensor]


class Expert(NamedTuple):
    """The parameters of one expert."""

    up: Tensor
    bup: Maybe
    down: Tensor
    bdown: Maybe


def loop(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """out[n] = (act(x[n] @ Wup[e] + bup[e]) * w[n]) @ Wdown[e] + w[n] * bdown[e], e the expert of row n.

    With `config.apply_router_weight_after_down`: out[n] = w[n] * (act(x[n] @ Wup[e] + bup[e]) @ Wdown[e] + bdown[e]).
    Matrices multiply in x's dtype, whatever the dtype of the parameters; [N, D] comes back in the dtype of the
    weights, fp32 or fp64. Parameters are those of `fmoe.experts`, here [E, ..] with E = len(rows.counts).

    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> rows = Rows(torch.tensor([[2.0], [3.0]]), torch.tensor([1.0, 0.5]), torch.tensor([1, 1]))
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> loop(params, rows, config).flatten().tolist()
    [4.0, 45.0]
    """
    counts = rows.counts.tolist()
    # unbind gives the experts that are not used a zero gradient; with no row at all, expert 0 takes its empty share
    used = [e for e, count in enumerate(counts) if count] or [0]
    mlp = _after_down if config.apply_router_weight_after_down else _between
    act, xs, ws = activation(config), rows.x.split(counts), rows.weights[:, None].split(counts)
    experts = _unbind(params, len(counts))
    return torch.cat([mlp(act, xs[e], ws[e], experts[e]) for e in used])


def _between(act: Act, x: Tensor, w: Tensor, p: Expert) -> Tensor:
    out = _matmul(act(_matmul(x, p.up, p.bup), w), p.down, None).to(w.dtype)
    return out if p.bdown is None else out + w * p.bdown.to(x.dtype)


def _after_down(act: Act, x: Tensor, w: Tensor, p: Expert) -> Tensor:
    return w * _matmul(act(_matmul(x, p.up, p.bup), None), p.down, p.bdown).to(w.dtype)


def _unbind(params: Params, n: int) -> list[Expert]:
    none = (None,) * n
    bup, bdown = (params[b].unbind() if b in params else none for b in ("gate_up_proj_bias", "down_proj_bias"))
    ups, downs = params["gate_and_up_projs"].unbind(), params["down_projs"].unbind()
    return [Expert(*parts) for parts in zip(ups, bup, downs, bdown, strict=True)]


def _matmul(x: Tensor, w: Tensor, bias: Maybe) -> Tensor:
    """x @ w + bias in x's dtype."""
    # one storage order for every product: BLAS may round another one differently, and strides must not change a result
    return F.linear(x, w.to(x.dtype).mT.contiguous(), None if bias is None else bias.to(x.dtype))
