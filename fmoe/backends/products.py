"""Products of rows and matrices by expert, differentiable in every way: the operators `fmoe::gmm` and `fmoe::tgmm`.

    gmm(x, w, offsets)[n] = x[n] @ w[e]                                for the rows n of expert e
    tgmm(x, y, offsets)[e] = the sum of x[n]^T y[n]                    over the rows n of expert e

Each is the other's derivative, so every order of derivatives is made of these two. `raw/` has who computes them. The
operators are opaque to compilers, autograd sits in Functions around them, and Dynamo takes `gmm` as it is: that form
alone survives torch.compile(torch.func.grad(f)), which drops any other custom backward.
"""

from typing import Any

import torch
from fmoe_kernels.host.batch import one_by_one
from fmoe_kernels.host.flops import formula
from fmoe_kernels.host.function import Function
from torch import Tensor

from fmoe.backends.raw import RAW
from fmoe.dispatch.watched import untraced, unwatched


@torch._dynamo.allow_in_graph
def gmm(x: Tensor, w: Tensor, offsets: Tensor, by: str) -> Tensor:
    """out[n] = x[n] @ w[e]: x [N, K], w [E, K, M] of any strides and dtype -> [N, M] in x's dtype, which multiplies.

    offsets [E] int32: where the rows of each expert end; rows after the last end are unspecified, here and in
    gradients. by: a name in `RAW`. No gradient is computed that is not needed; that of w has its strides, so that
    autograd keeps it as it is.

    >>> gmm(torch.ones(3, 1), torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([1, 3]).int(), "loop").flatten().tolist()
    [1.0, 5.0, 5.0]
    """
    return RAW[by].gmm(x, w, offsets) if _alone(x, w, offsets) else _Gmm.apply(x, w, offsets, by)


def _tgmm(x: Tensor, y: Tensor, offsets: Tensor, by: str) -> Tensor:
    return RAW[by].tgmm(x, y, offsets) if _alone(x, y, offsets) else _Tgmm.apply(x, y, offsets, by)


def _alone(*tensors: Tensor) -> bool:
    """Does nobody listen, neither to autograd nor to operators? Then what is behind them is called itself."""
    untraced("a backend")
    return unwatched(*tensors) and not torch.is_autocast_enabled(tensors[0].device.type)


@torch.library.custom_op("fmoe::gmm", mutates_args=())
def gmm_op(x: Tensor, w: Tensor, offsets: Tensor, by: str) -> Tensor:
    """`gmm` without autograd. Autocast has been settled by the caller and must not reach the products."""
    with torch.autocast(x.device.type, enabled=False):
        return RAW[by].gmm(x, w, offsets)


@torch.library.custom_op("fmoe::tgmm", mutates_args=())
def tgmm_op(x: Tensor, y: Tensor, offsets: Tensor, by: str) -> Tensor:
    """out[e] = the sum of x[n]^T y[n]: x [N, K], y [N, M] -> [E, K, M], without autograd."""
    with torch.autocast(x.device.type, enabled=False):
        return RAW[by].tgmm(x, y, offsets)


@gmm_op.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor, by: str) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@tgmm_op.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor, by: str) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])


@formula(torch.ops.fmoe.gmm)
def _(x: list[int], w: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """2 N K M: every row, also those that go nowhere where no host could count."""
    return 2 * x[0] * x[1] * w[2]


@formula(torch.ops.fmoe.tgmm)
def _(x: list[int], y: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * y[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.by = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


class _Gmm(Function):
    setup_context = staticmethod(_save)

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return RAW[args[3]].gmm(*args[:3]) if _alone(*args[:2]) else gmm_op(*args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        dx = gmm(dy, w.mT, offsets, ctx.by) if ctx.needs_input_grad[0] else None
        return dx, _weight_grad(x, dy, w, offsets, ctx.by) if ctx.needs_input_grad[1] else None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, *_: None) -> Tensor:
        x, w, offsets = ctx.saved_tensors
        return _sum(
            None if dx is None else _Gmm.apply(dx, w, offsets, ctx.by),
            None if dw is None else _Gmm.apply(x, dw, offsets, ctx.by),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Gmm, info, in_dims, args)


class _Tgmm(Function):
    setup_context = staticmethod(_save)

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return RAW[args[3]].tgmm(*args[:3]) if _alone(*args[:2]) else tgmm_op(*args)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        x, y, offsets = ctx.saved_tensors
        dx = _Gmm.apply(y, dw.mT, offsets, ctx.by) if ctx.needs_input_grad[0] else None
        dy = _Gmm.apply(x, dw, offsets, ctx.by) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None, *_: None) -> Tensor:
        x, y, offsets = ctx.saved_tensors
        return _sum(
            None if dx is None else _Tgmm.apply(dx, y, offsets, ctx.by),
            None if dy is None else _Tgmm.apply(x, dy, offsets, ctx.by),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Tgmm, info, in_dims, args)


def _weight_grad(x: Tensor, dy: Tensor, w: Tensor, offsets: Tensor, by: str) -> Tensor:
    """tgmm(x, dy), stored in the order of w."""
    transposed = w.stride(1) < w.stride(2)
    a, b = (dy, x) if transposed else (x, dy)
    dw = _tgmm(a, b, offsets, by)
    return (dw.mT if transposed else dw).to(w.dtype)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor:
    return b if a is None else a if b is None else a + b  # type: ignore[return-value]
