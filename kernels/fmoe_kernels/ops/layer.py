"""The whole expert layer, differentiable: right under backward, torch.func, vmap, compile and checkpointing.

Forward and backward are each an autograd.Function over one opaque operator, and Dynamo takes the call as it is: that
form alone survives torch.compile(torch.func.grad(f)), which drops any other custom backward.
"""

from typing import Any

import torch
from torch import Tensor

from fmoe_kernels import reference
from fmoe_kernels.host.batch import one_by_one
from fmoe_kernels.host.check import check_flags, check_layer, check_numbers
from fmoe_kernels.host.configs import load
from fmoe_kernels.host.function import Function
from fmoe_kernels.ops import flops  # noqa: F401  its formulas, for whoever counts
from fmoe_kernels.ops.custom import experts_backward, experts_forward
from fmoe_kernels.programs.scalars import bound

Maybe = Tensor | None


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    mask: Maybe,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Maybe = None,
    b_down: Maybe = None,
    *,
    activation: str = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    weight_after_down: bool = False,
    start: int = 0,
    recompute: bool = False,
    wide: bool = False,
    batch_invariant: bool = False,
    table: str = "",
) -> Tensor:
    """y[t] = sum_k weights[t, k] * (act(x[t] @ w_up[e] + b_up[e]) @ w_down[e] + b_down[e]), e = indices[t, k] - start.

    x [T, D] fp16, bf16 or fp32 (fp64: the eager twin, which waits for the device). indices [T, K] integer; ids outside
    [start, start + E) send that slot nowhere. weights [T, K] floating. mask [T] bool or None. w_up [E, D, U],
    w_down [E, I, D], b_up [E, U], b_down [E, D] of any strides. y [T, D] in x's dtype, or fp32 if wide.

    Products are in x's dtype (under autocast in autocast's), weights and sums over k in fp32. The weight multiplies the
    activation, or with weight_after_down the rounded output of the expert. activation: a name in
    `programs.scalars`, with its alpha and limit; U = I for relu2 and 2I otherwise. Backward keeps x, z = x @ w_up
    of the routed rows, the routing and its weights; with recompute, not z. No gradient is computed that is not needed,
    and the derivative of a derivative raises. table: a file that `fmoe_kernels.tune` wrote; batch_invariant: the same
    tiles whatever the number of rows, so that a token's result does not depend on its neighbours.

    Raises ValueError for tensors that do not fit, an unknown activation, a file that is no table or whose tiles do not
    launch here, and tensors on a CPU outside the interpreter.
    """
    check_layer("experts", x, indices, weights, mask, w_up, w_down, b_up, b_down, activation, start)
    check_numbers("experts", alpha=alpha, limit=limit)
    flags = dict(weight_after_down=weight_after_down, recompute=recompute, wide=wide, batch_invariant=batch_invariant)
    check_flags("experts", **flags)
    if not isinstance(table, str):
        raise ValueError(f"experts: table is {table!r}, expected the path of a file that fmoe_kernels.tune wrote")
    if table and not torch.compiler.is_compiling():  # a compiler's graph reads it when it runs
        load(table)
    device, out_dtype = x.device.type, torch.float32 if wide else x.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    indices = indices if indices.dtype in (torch.int32, torch.int64) else indices.long()
    w_up, w_down = w_up.to(x.dtype), w_down.to(x.dtype)
    b_up, b_down = (None if b is None else b.to(x.dtype) for b in (b_up, b_down))
    if x.dtype == torch.float64:
        y = reference.experts(
            x, indices, weights, mask, w_up, w_down, b_up, b_down, activation, alpha, limit, weight_after_down, start
        )
        return y.to(out_dtype)
    tracked = torch.is_grad_enabled() and any(
        p is not None and p.requires_grad for p in (x, weights, w_up, w_down, b_up, b_down)
    )
    options = (activation, float(alpha), bound(activation, limit), weight_after_down, start, tracked and not recompute)
    unrounded = x.dtype != out_dtype  # under autocast too: what has the caller's dtype is rounded once, to that
    last = (*options, unrounded, batch_invariant, table)
    return _experts(x, indices, weights.float(), mask, w_up, w_down, b_up, b_down, *last).to(out_dtype)


class _Forward(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return experts_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, weights, _, w_up, w_down, b_up, b_down, activation, alpha, limit, *_, batch_invariant, table = inputs
        _, z, *route = output
        ctx.save_for_backward(x, z, *route, weights, w_up, w_down, b_up, b_down)
        ctx.options = activation, alpha, limit, batch_invariant, table
        ctx.mark_non_differentiable(z, *route)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Maybe, *_: Any) -> tuple[Maybe, ...]:
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 4, 5, 6, 7)]
        if dy is None or not any(needs):
            return (None,) * 17
        grads = _Backward.apply(dy, *ctx.saved_tensors, *ctx.options, needs)
        x, weights, *params = (g if need else None for g, need in zip(grads, needs, strict=True))
        return x, None, weights, None, *params, *(None,) * 9

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "fmoe_kernels.experts: forward mode, which torch.func.hessian takes, is not implemented by the kernels;"
            " use fmoe's backend 'torch_mm' or 'loop' in place of 'triton', or reference.experts"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Forward, info, in_dims, args)


class _Backward(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return experts_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Maybe, ...]:
        raise NotImplementedError(
            "fmoe_kernels.experts: the derivative of a derivative is not implemented by the kernels;"
            " use fmoe's backend 'torch_mm' or 'loop' in place of 'triton', or reference.experts"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Backward, info, in_dims, args)


@torch._dynamo.allow_in_graph
def _experts(*args: Any) -> Tensor:
    return _Forward.apply(*args)[0]
