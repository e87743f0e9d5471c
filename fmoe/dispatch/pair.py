"""dispatch and combine over a group, from one pair of linear maps that are each other's transpose.

    forth(step, x [T, D], w [T, K, J], plan) -> rows [N, D], w [N, J]      the copies of each token, to their experts
    back(step, rows [N, D], w [N, J], plan) -> y [T, D], w [T, K, J]       and back, added up for each token

So the backward of each is the other, with the same plan, to any order. w holds one number for each slot (J = 1: the
routing weights, which travel with their rows) or none (J = 0: combine). Neither map knows of autograd.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from fmoe_kernels.host.function import Function
from torch import Tensor
from torch.utils import _pytree as pytree

from fmoe.dispatch.context import Context
from fmoe.dispatch.rows import Dispatcher, Rows
from fmoe.dispatch.watched import untraced
from fmoe.types import MoEConfig, Routing

Map = Callable[[str, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
P = TypeVar("P")


class Sizes(NamedTuple):
    """What a plan fixes: x [T, D] of dtype, weights [T, K], and wide, the dtype of sums and of weights on their way."""

    T: int
    K: int
    D: int
    dtype: torch.dtype
    wide: torch.dtype


def sizes(routing: Routing, config: MoEConfig) -> Sizes:
    wide = torch.promote_types(torch.promote_types(_floating(config), routing.weights.dtype), torch.float32)
    T, K = routing.indices.shape
    return Sizes(T, K, config.expert_dim, _floating(config), wide)


def _floating(config: MoEConfig) -> torch.dtype:
    assert isinstance(config.dtype, torch.dtype)  # MoEConfig has made it one
    return config.dtype


def facts(routing: Routing, config: MoEConfig) -> dict[str, Any]:
    """What the ranks of a plan must have in common."""
    told = dict(E=config.n_routed_experts, K=routing.indices.shape[1], D=config.expert_dim)
    return told | {"dtype of x": config.dtype, "dtype of weights": routing.weights.dtype}


def share(ctx: Context, E: int) -> int:
    """How many experts each rank has. Raises ValueError unless all have as many."""
    if E % ctx.size:
        raise ValueError(
            f"{ctx.name}: plan: {E} experts on {ctx.size} ranks, expected E % ranks == 0: "
            "each rank has the same number of experts"
        )
    return E // ctx.size


def value(*tensors: str) -> Callable[[type[P]], type[P]]:
    """A dataclass as a pytree: the fields named are its leaves, all others are static."""

    def register(cls: type[Any]) -> type[Any]:
        static = [f.name for f in fields(cls) if f.name not in tensors]
        pytree.register_pytree_node(
            cls,
            lambda plan: ([getattr(plan, n) for n in tensors], tuple(getattr(plan, n) for n in static)),
            lambda leaves, rest: cls(**dict(zip(tensors, leaves, strict=True)), **dict(zip(static, rest, strict=True))),
        )
        return cls

    return register


def pair(
    ctx: Context, kind: type, plan: Callable[..., Any], forth: Callable[..., Any], back: Callable[..., Any]
) -> Dispatcher:
    """The Dispatcher of plan(ctx, routing, config), forth(ctx, ..) and back(ctx, ..).

    A plan is of this kind, and has `sizes`, `counts` and `n_rows`.
    """
    maps = partial(forth, ctx), partial(back, ctx)

    def make(routing: Routing, config: MoEConfig) -> Any:
        ctx.check("plan")
        untraced(f"{ctx.name}: plan")
        with torch.no_grad():
            return plan(ctx, Routing(*routing), config)

    def own(step: str, plan: Any) -> None:
        ctx.check(step)
        if not isinstance(plan, kind):
            found = f"{type(plan).__name__} of {type(plan).__module__}"
            raise ValueError(f"{ctx.name}: {step}: plan is a {found}, expected one that it made")

    def dispatch(x: Tensor, weights: Tensor, plan: Any) -> Rows:
        own("dispatch", plan)
        T, K, D, dtype, wide = plan.sizes
        _expect(ctx, "dispatch", "x", x, [T, D], dtype)
        _expect(ctx, "dispatch", "weights", weights, [T, K])
        if torch.promote_types(weights.dtype, wide) != wide:
            raise ValueError(f"{ctx.name}: dispatch: weights are {weights.dtype}, wider than the {wide} of the plan")
        rows, w = _Forth.apply(x, weights.to(wide)[..., None], *maps, plan, "dispatch")
        return Rows(rows, w[:, 0], plan.counts)

    def combine(rows: Tensor, plan: Any) -> Tensor:
        own("combine", plan)
        _expect(ctx, "combine", "rows", rows, [plan.n_rows, plan.sizes.D])
        wide = plan.sizes.wide  # what ranks agreed to send, whatever a backend made
        y: Tensor = _Back.apply(rows.to(wide), rows.new_empty(len(rows), 0, dtype=wide), *maps, plan, "combine")[0]
        return y

    # a compiler that looked inside would trace collectives of sizes that it cannot know, and lose gradients silently
    eager = partial(torch.compiler.disable, reason=f"{ctx.name} talks to other ranks: compile what is around it")
    return Dispatcher(eager(make), eager(dispatch), eager(combine), ctx.close)


def _expect(ctx: Context, step: str, name: str, t: Tensor, shape: list[int], dtype: torch.dtype | None = None) -> None:
    if list(t.shape) != shape or dtype not in (None, t.dtype):
        raise ValueError(
            f"{ctx.name}: {step}: {name} is {t.dtype} {list(t.shape)}, the plan was made for {dtype or 'floating'} "
            f"{shape}: make it with the routing and the config of these tokens, config.dtype being the dtype of x"
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w, *ctx.rest = inputs
    ctx.dtypes = x.dtype, w.dtype


def _turned(ctx: Any) -> tuple[Any, ...]:
    forth, back, plan, step = ctx.rest
    return forth, back, plan, f"backward of {step}"


class _Forth(Function):
    setup_context = staticmethod(_keep)

    @staticmethod
    def forward(x: Tensor, w: Tensor, forth: Map, back: Map, plan: Any, step: str) -> tuple[Tensor, Tensor]:
        return forth(step, x, w, plan)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dw: Tensor) -> tuple[Any, ...]:
        grads = _Back.apply(dx, dw, *_turned(ctx))
        return *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None, None


class _Back(Function):
    setup_context = staticmethod(_keep)

    @staticmethod
    def forward(rows: Tensor, w: Tensor, forth: Map, back: Map, plan: Any, step: str) -> tuple[Tensor, Tensor]:
        return back(step, rows, w, plan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dw: Tensor) -> tuple[Any, ...]:
        grads = _Forth.apply(dy, dw, *_turned(ctx))
        return *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None, None
