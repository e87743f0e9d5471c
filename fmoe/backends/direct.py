"""A layer of experts on a CPU in the least steps: the host knows how many rows there are, and nobody looks inside.

Some experts at a time: their rows, activations and gradients stay in a core's cache from one step to the next, and
what autograd keeps is what the first product gives.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from fmoe_kernels.host.batch import of_members
from fmoe_kernels.host.function import Function
from torch import Tensor

from fmoe.backends.order import Order, of, ordered, parts
from fmoe.backends.raw.loop import at_once, multiply, outer, tgmm
from fmoe.backends.raw.memory import empty, partly
from fmoe.backends.weighted import derivatives, weighted
from fmoe.dispatch import local
from fmoe.dispatch.watched import recorded
from fmoe.types import MoEConfig, Params, Routing

NAMES = ("gate_and_up_projs", "down_projs")


def direct(params: Params, x: Tensor, routing: Routing, config: MoEConfig, dtype: torch.dtype) -> Tensor | None:
    """y of `fmoe.experts`, rounded to a dtype, or None where a slot goes nowhere.

    The steps of the dispatcher `local` and the backend `loop`, in their order: bit for bit their result. Parameters
    without LoRA, plain tensors. None also for a gradient where there are biases, or weights come after the experts.

    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> routing = Routing(torch.tensor([[1], [0]]), torch.tensor([[0.5], [1.0]]))
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> direct(params, torch.tensor([[3.0], [2.0]]), routing, config, torch.float32).flatten().tolist()
    [45.0, 4.0]
    """
    indices, weights, mask = routing
    record = recorded(x, weights, *params.values())
    if mask is not None or (record and (len(params) > 2 or config.apply_router_weight_after_down)):
        return None
    E = config.n_routed_experts
    sort = (record or 4 * indices.shape[1] >= E) and any(at_once(x, params[name]) for name in NAMES)
    order = ordered(indices, E, sort)
    if order is None:
        return None
    if record:
        y: Tensor = _Recorded.apply(x, weights, *(params[name] for name in NAMES), indices, order, config, dtype)
        return y
    return _forward(params, x, weights, order, config, dtype)


def _forward(
    params: Params,
    x: Tensor,
    weights: Tensor,
    order: Order,
    config: MoEConfig,
    dtype: torch.dtype,
    keep: Tensor | None = None,
) -> Tensor:
    """y; keep [N, U]: where what the first product gives is written."""
    up, down = (params[name] for name in NAMES)
    act, after = weighted(config), config.apply_router_weight_after_down
    biased, biased_y = "gate_up_proj_bias" in params, "down_proj_bias" in params
    w = order.weights(weights, x, narrow=not (after or biased_y))
    plain = not (after or biased_y) and w.dtype in (x.dtype, torch.promote_types(x.dtype, torch.float32))
    out = empty((len(w), down.shape[2]), x if plain else w)

    def bias(name: str, sizes: dict[int, int]) -> Tensor:
        ids = torch.tensor([*sizes]).repeat_interleave(torch.tensor([*sizes.values()]))
        return params[name].index_select(0, ids).to(x.dtype)

    for rows, sizes in parts(order, up, down, x):
        u = multiply(order.rows(x, rows), up, sizes, None if keep is None else of(keep, rows))
        h = act(u + bias("gate_up_proj_bias", sizes) if biased else u, None if after else of(w, rows))
        if plain:
            multiply(h, down, sizes, of(out, rows))
            continue
        o = multiply(h, down, sizes)
        if after:
            y = of(w, rows) * (o + bias("down_proj_bias", sizes) if biased_y else o).to(w.dtype)
        else:
            y = o.to(w.dtype) + of(w, rows) * bias("down_proj_bias", sizes).to(w.dtype) if biased_y else o
        of(out, rows).copy_(y)
    return order.added(out, weights.shape[1], dtype)


class _Recorded(Function):
    """`_forward` of two weights alone; backward keeps its arguments and the first product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        indices: Tensor,
        order: Order,
        config: Any,
        dtype: torch.dtype,
    ) -> Tensor:
        u = empty((weights.numel(), up.shape[2]), x)
        y = _forward(dict(zip(NAMES, (up, down), strict=True)), x, weights, order, config, dtype, keep=u)
        ctx.save_for_backward(x, weights, up, down, u)
        ctx.indices, ctx.order, ctx.config = indices.clone(), order, config  # whoever fills them anew may
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # with gradients enabled, there will be a derivative of these
        made = partial(_differentiable if torch.is_grad_enabled() else _backward, ctx, *ctx.saved_tensors)
        with torch.autocast("cpu", enabled=False):
            return *of_members(made, dy), None, None, None, None


def _differentiable(
    ctx: Any, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, u: Tensor, dy: Tensor
) -> list[Tensor | None]:
    from fmoe.backends.mlp import mlp

    # views: one may be made of another, as weights are of x, and each gradient is that of its own place alone
    inputs = x, weights, up, down = [t.view_as(t) for t in (x, weights, up, down)]
    plan = local.plan(Routing(ctx.indices, weights), ctx.config)
    rows = mlp(dict(zip(NAMES, (up, down), strict=True)), local.dispatch(x, weights, plan), ctx.config, by="loop")
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    y = local.combine(rows, plan)
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _backward(
    ctx: Any, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, u: Tensor, dy: Tensor
) -> list[Tensor | None]:
    order, needed = ctx.order, ctx.needs_input_grad
    dy, w = dy.to(x.dtype), order.weights(weights, x, narrow=True)
    dx = empty((len(w), x.shape[1]), x) if needed[0] else None
    dw = torch.empty_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
    d_up, d_down = (_Grad(m, order.sizes, x) if n else None for m, n in zip((up, down), needed[2:], strict=False))
    for rows, sizes in parts(order, up, down, x):
        out = order.rows(dy, rows)
        h, du, dp = derivatives(ctx.config, of(u, rows), of(w, rows), multiply(out, down.mT, sizes))
        of(dw, rows).copy_(dp)
        if d_down:
            d_down.add(h, out, sizes)
        if d_up:
            d_up.add(order.rows(x, rows), du, sizes)
        if dx is not None:
            multiply(du, up.mT, sizes, of(dx, rows))
    return [
        None if dx is None else order.added(dx, weights.shape[1], x.dtype),
        order.slots(dw).view(weights.shape).to(weights.dtype) if needed[1] else None,
        d_up.whole() if d_up else None,
        d_down.whole() if d_down else None,
    ]


class _Grad:
    """The gradient of a weight, stored in its order, so that autograd keeps it as it is."""

    def __init__(self, weight: Tensor, sizes: dict[int, int], x: Tensor) -> None:
        self.turned, self.dtype, self.at_once = weight.stride(1) < weight.stride(2), weight.dtype, at_once(x, weight)
        self.rows = [sizes.get(e, 0) for e in range(len(weight))]
        if not self.at_once:
            self.out = partly((weight.mT if self.turned else weight).shape, x, self.rows)

    def add(self, a: Tensor, b: Tensor, sizes: dict[int, int]) -> None:
        a, b = (b, a) if self.turned else (a, b)
        if self.at_once:  # then these are all rows
            self.out = tgmm(a, b, torch.tensor([*accumulate(self.rows)]))
        else:
            outer(a, b, sizes, self.out)

    def whole(self) -> Tensor:
        return (self.out.mT if self.turned else self.out).to(self.dtype)
