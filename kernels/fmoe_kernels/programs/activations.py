"""Expert activations (u [.., U], p) -> act(u) * p in u's dtype, differentiable, in one pass over memory each way.

One kernel forward and one backward serve all of them: the scalar function is an argument. p, the routing weight, is
one number for each row, broadcastable to [.., 1]; arithmetic is in fp32 (fp64: the eager twin). The eager twin is
`reference.activate`. Derivatives of derivatives raise NotImplementedError, tensors that do not fit ValueError.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmoe_kernels import reference
from fmoe_kernels.host.batch import one_by_one
from fmoe_kernels.host.check import WIDE, check_device, check_kind, check_numbers
from fmoe_kernels.host.function import Function
from fmoe_kernels.host.launch import check_runs, flat, run
from fmoe_kernels.programs.scalars import GATED, INTERLEAVED, SCALARS, bound

Maybe = Tensor | None


def swiglu(u: Tensor, p: Maybe = None) -> Tensor:
    """silu(g) * v * p with u = [g, v]."""
    return _activate(u, p, "swiglu")


def swiglu_clamped(u: Tensor, p: Maybe = None, limit: float = 7.0) -> Tensor:
    """silu(min(g, limit)) * clip(v, -limit, limit) * p with u = [g, v]."""
    return _activate(u, p, "swiglu_clamped", 1.0, limit)


def swiglu_oai(u: Tensor, p: Maybe = None, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """g * sigmoid(alpha * g) * (v + 1) * p with u = [g, v], first clipped as `swiglu_clamped` where limit > 0."""
    return _activate(u, p, "swiglu_oai", alpha, limit)


def quick_geglu(u: Tensor, p: Maybe = None, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """g * sigmoid(alpha * g) * (v + 1) * p with u = [g0, v0, g1, v1, ..], first clipped whatever the sign of limit."""
    return _activate(u, p, "quick_geglu", alpha, limit)


def geglu(u: Tensor, p: Maybe = None) -> Tensor:
    """gelu(g) * v * p with u = [g, v] and gelu's tanh form."""
    return _activate(u, p, "geglu")


def situ(u: Tensor, p: Maybe = None, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    """alpha * tanh(g / alpha) * sigmoid(g) * limit * tanh(v / limit) * p with u = [g, v]; v itself where limit <= 0."""
    return _activate(u, p, "situ", alpha, limit)


def relu2(u: Tensor, p: Maybe = None) -> Tensor:
    """max(u, 0)^2 * p; not gated, so that U = I."""
    return _activate(u, p, "relu2")


def _activate(u: Tensor, p: Maybe, name: str, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    check_kind(name, "u", u, ".. U", WIDE)
    check_numbers(name, alpha=alpha, limit=limit)
    if u.ndim == 0 or (GATED[name] and u.shape[-1] % 2):
        columns = u.shape[-1] if u.ndim else "no"
        raise ValueError(f"{name}: u has {columns} columns, expected an even number: gate and up")
    shape = u.shape[:-1]
    if p is not None:
        check_kind(name, "p", p, ".. 1", WIDE)
        check_device(name, "p", p, "u", u)
        if p.ndim > u.ndim or any(n not in (1, m) for n, m in zip(p.shape[::-1], (1, *shape[::-1]), strict=False)):
            raise ValueError(f"{name}: p is {list(p.shape)}, expected one weight for each row: {[*shape, 1]}")
        p = p.expand(*shape, 1)
    if u.dtype == torch.float64:
        y = reference.activate(u, name, alpha, limit)
        return y if p is None else (y * p).to(u.dtype)
    weights = None if p is None else p.reshape(-1).float()
    y = _call(u.reshape(shape.numel(), u.shape[-1]), weights, name, float(alpha), bound(name, limit))
    return y.reshape(*shape, y.shape[1])


@triton.jit
def load_pair(u, n, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """(gate, up) of columns n : n + BLOCK of one row, in fp32; what is past I is zero."""
    columns = n + tl.arange(0, BLOCK)
    if INTERLEAVED:
        both = 2 * n + tl.arange(0, 2 * BLOCK)
        g, v = tl.load(u + both, mask=both < 2 * I, other=0.0).to(tl.float32).reshape(BLOCK, 2).split()
    else:
        g = tl.load(u + columns, mask=columns < I, other=0.0).to(tl.float32)
        v = g
        if GATED:
            v = tl.load(u + I + columns, mask=columns < I, other=0.0).to(tl.float32)
    return g, v


@triton.jit
def forward_kernel(
    u, p, y, I, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK
    g, v = load_pair(u + row * (2 * I if GATED else I), n, I, GATED, INTERLEAVED, BLOCK)
    a, _, _ = ACT(g, v, alpha, limit)
    if WEIGHTED:
        a *= tl.load(p + row)
    columns = n + tl.arange(0, BLOCK)
    tl.store(y + row * I + columns, a.to(y.dtype.element_ty), mask=columns < I)


@triton.jit
def backward_kernel(
    dy, u, p, du, dp, I, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * (2 * I if GATED else I)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(0, I, BLOCK):
        columns = n + tl.arange(0, BLOCK)
        g, v = load_pair(u + start, n, I, GATED, INTERLEAVED, BLOCK)
        q = tl.load(dy + row * I + columns, mask=columns < I, other=0.0).to(tl.float32)
        a, dg, dv = ACT(g, v, alpha, limit)
        total += tl.where(columns < I, q * a, 0.0)
        if WEIGHTED:
            q *= tl.load(p + row)
        if INTERLEAVED:
            both = 2 * n + tl.arange(0, 2 * BLOCK)
            pair = tl.join(q * dg, q * dv).reshape(2 * BLOCK)
            tl.store(du + start + both, pair.to(du.dtype.element_ty), mask=both < 2 * I)
        else:
            tl.store(du + start + columns, (q * dg).to(du.dtype.element_ty), mask=columns < I)
            if GATED:
                tl.store(du + start + I + columns, (q * dv).to(du.dtype.element_ty), mask=columns < I)
    if WEIGHTED:
        tl.store(dp + row, tl.sum(total))


@torch.library.custom_op("fmoe_kernels::act_forward", mutates_args=())
def act_forward(u: Tensor, p: Maybe, name: str, alpha: float, limit: float) -> Tensor:
    """u [N, U], p [N] fp32 or None -> [N, I]."""
    check_runs(u=u, p=p)
    y = u.new_empty(len(u), u.shape[1] // (1 + GATED[name]))
    kinds, block = _kinds(name, p, y)
    if y.numel():
        grid = (len(u), triton.cdiv(y.shape[1], block))
        run(forward_kernel, grid, u.contiguous(), _rows(p), y, y.shape[1], alpha, limit, **kinds, BLOCK=block)
    return y


@torch.library.custom_op("fmoe_kernels::act_backward", mutates_args=())
def act_backward(dy: Tensor, u: Tensor, p: Maybe, name: str, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    """(du [N, U], dp [N] fp32, empty without p)."""
    du = u.new_empty(u.shape)
    dp = u.new_zeros(0 if p is None else len(u), dtype=torch.float32)
    kinds, block = _kinds(name, p, dy)
    if dy.numel():
        args = (dy.contiguous(), u.contiguous(), _rows(p), du, dp, dy.shape[1], alpha, limit)
        run(backward_kernel, (len(u),), *args, **kinds, BLOCK=block)
    return du, dp


@act_forward.register_fake
def _(u, p, name, alpha, limit):
    return u.new_empty(u.shape[0], u.shape[1] // (1 + GATED[name]))


@act_backward.register_fake
def _(dy, u, p, name, alpha, limit):
    return u.new_empty(u.shape), u.new_empty(0 if p is None else u.shape[0], dtype=torch.float32)


def _rows(p: Maybe) -> Maybe:
    return None if p is None else flat(p)


def _kinds(name: str, p: Maybe, y: Tensor) -> tuple[dict[str, Any], int]:
    kinds = dict(ACT=SCALARS[name], GATED=GATED[name], INTERLEAVED=INTERLEAVED[name], WEIGHTED=p is not None)
    return kinds, min(triton.next_power_of_2(max(y.shape[1], 1)), 1024)


class _Forward(Function):
    @staticmethod
    def forward(*args: Any) -> Tensor:
        return act_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, p, *ctx.options = inputs
        ctx.save_for_backward(u, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        du, dp = _Backward.apply(dy, *ctx.saved_tensors, *ctx.options)
        return du, None if ctx.saved_tensors[1] is None else dp, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "fmoe_kernels.activations: forward mode, which torch.func.hessian takes, is not implemented by the kernels;"
            " use fmoe_kernels.reference.activate"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Forward, info, in_dims, args)


class _Backward(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return act_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Maybe, ...]:
        raise NotImplementedError(
            "fmoe_kernels.activations: the derivative of a derivative is not implemented by the kernels;"
            " use fmoe_kernels.reference.activate"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Backward, info, in_dims, args)


@torch._dynamo.allow_in_graph
def _call(*args: Any) -> Tensor:
    return _Forward.apply(*args)
