"""The whole expert layer as two opaque operators, forward and backward, without autograd: `layer.py` adds that.

Opaque means that compilers see shapes only. Both return fresh tensors, write to no argument, and never wait for the
device. What backward needs is an argument or a result of forward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fmoe_kernels.host import configs
from fmoe_kernels.host.check import few_enough
from fmoe_kernels.host.launch import Act, Tiling, check_runs, dense, flat, tiles_of
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import Route, make_route
from fmoe_kernels.programs.sums import bias_gradient, combine, dweight
from fmoe_kernels.programs.up import up

Maybe = Tensor | None


@torch.library.custom_op("fmoe_kernels::experts_forward", mutates_args=())
def experts_forward(
    x: Tensor, indices: Tensor, weights: Tensor, mask: Maybe,
    w_up: Tensor, w_down: Tensor, b_up: Maybe, b_down: Maybe,
    activation: str, alpha: float, limit: float, weight_after_down: bool, start: int, save_z: bool, wide: bool,
    batch_invariant: bool, table: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [T, D], z [T K, U] or empty, slots, tokens, inverse [T K], offsets [E + 1]); y is fp32 if wide, else as x.

    weights [T, K] fp32. Rows of z past offsets[E] are unspecified.
    """
    check_runs(x=x)
    few_enough("experts", "the routing", indices.numel())
    configs.load(table)
    r = make_route(indices, mask, len(w_up), start)
    dtype = torch.float32 if wide else x.dtype
    if indices.numel() == 0:
        none = x.new_empty(0, w_up.shape[2] if save_z else 0)
        return x.new_zeros(x.shape, dtype=dtype), none, r.slots, r.tokens, r.inverse, r.offsets
    act, tiling, w = Act(activation, alpha, limit), Tiling(table, batch_invariant), flat(weights)
    inside = None if weight_after_down else w
    with tiles_of(table):
        a, z = up(dense(x), w_up, b_up, inside, r, act, tiling, save_z)
        rows = gmm(a, w_down, b_down, inside, r, tiling)
        y = combine(rows, w if weight_after_down else None, r, len(x), dtype)
    return y, x.new_empty(0, 0) if z is None else z, r.slots, r.tokens, r.inverse, r.offsets


@experts_forward.register_fake
def _(x, indices, weights, mask, w_up, w_down, b_up, b_down, activation, alpha, limit, weight_after_down, start,
      save_z, wide, batch_invariant, table):  # fmt: skip
    n = indices.numel()
    y = x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)
    z = x.new_empty(n if save_z else 0, w_up.shape[2] if save_z else 0)
    integers = (indices.new_empty(size, dtype=torch.int32) for size in (n, n, n, w_up.shape[0] + 1))
    return y, z, *integers


@torch.library.custom_op("fmoe_kernels::experts_backward", mutates_args=())
def experts_backward(
    dy: Tensor, x: Tensor, z: Tensor, slots: Tensor, tokens: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
    w_up: Tensor, w_down: Tensor, b_up: Maybe, b_down: Maybe,
    activation: str, alpha: float, limit: float, batch_invariant: bool, table: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of (x, weights, w_up, w_down, b_up, b_down), each computed only where `needs` says so, else empty.

    An empty z is computed again from x. The gradients do not depend on where the weight was applied.
    """
    grads = _gradients_like(x, weights, w_up, w_down, b_up, b_down, needs)
    if inverse.numel() == 0:
        return _six(g.zero_() for g in grads)
    act, tiling = Act(activation, alpha, limit), Tiling(table, batch_invariant)
    r = Route(slots, tokens, inverse, offsets, weights.shape[1])
    x, dy, w = dense(x), dense(dy.to(x.dtype)), flat(weights)
    need_x, need_weights, need_up, need_down, need_b_up, need_b_down = needs
    with tiles_of(table):
        if z.numel() == 0:
            _, again = up(x, w_up, b_up, None, r, act, tiling, True)
            assert again is not None
            z = again
        dz, a, partial = dact(dy, w_down, z, w, r, act, tiling)
        if need_x:
            grads[0] = combine(gmm(dz, w_up.mT, None, None, r, tiling), None, r, len(x), x.dtype)
        if need_weights:
            grads[1] = dweight(partial, dy, b_down, r).view_as(weights)
        if need_up:
            dw(dz, x, r, grads[2].mT, tiling)
        if need_down:
            dw(a, dy, r, grads[3], tiling)
        if need_b_up:
            grads[4] = bias_gradient(dz, None, r, x.dtype)
        if need_b_down:
            grads[5] = bias_gradient(dy, w, r, x.dtype)
    return _six(grads)


@experts_backward.register_fake
def _(dy, x, z, slots, tokens, inverse, offsets, weights, w_up, w_down, b_up, b_down, activation, alpha, limit,
      batch_invariant, table, needs):  # fmt: skip
    return tuple(_gradients_like(x, weights, w_up, w_down, b_up, b_down, needs))


def _gradients_like(x, weights, w_up, w_down, b_up, b_down, needs) -> list[Tensor]:
    """Unwritten gradients: dense as their tensors are strided, or empty where none is needed."""
    like = (x, weights, w_up, w_down, b_up, b_down)
    return [
        torch.empty_like(t, memory_format=torch.preserve_format if t.ndim == 3 else torch.contiguous_format)
        if need and t is not None
        else x.new_empty(0)
        for t, need in zip(like, needs, strict=True)
    ]


def _six(grads) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weights, w_up, w_down, b_up, b_down = grads
    return x, weights, w_up, w_down, b_up, b_down
