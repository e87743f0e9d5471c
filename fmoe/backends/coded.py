"""Products of rows and matrices that are held as codes: each expert's is decoded when its rows are multiplied.

As `products.py`, and never with a gradient for codes and scales. Nothing decoded is kept: backward decodes again. The
host reads where each expert ends, so that only what is used is decoded; triton's kernel decodes the tile that it
multiplies and waits for nothing (but of blocks that are no powers of two, which it does not know).
"""

from dataclasses import replace
from typing import Any

import fmoe_kernels
import torch
from fmoe_kernels.host.batch import one_by_one
from fmoe_kernels.host.flops import formula
from fmoe_kernels.host.function import Function
from torch import Tensor

from fmoe.backends.held import held, parts
from fmoe.backends.raw import RAW
from fmoe.backends.raw.memory import empty
from fmoe.codecs.stacks import Codes, packed, suffix_of
from fmoe.dispatch.watched import unwatched
from fmoe.types import MoEConfig, Params


def gmm(x: Tensor, params: Params, name: str, offsets: Tensor, config: MoEConfig, by: str) -> Tensor:
    """out[n] = x[n] @ w[e], w the matrices [E, K, M] that params[name] and its scales say, decoded to x's dtype."""
    codes, scale, second, *how = parts(params, name, config)
    return _gmm(x, codes, scale, second, offsets, *how, False, by)


def linear(x: Tensor, params: Params, name: str) -> Tensor:
    """x @ w^T, w the matrix [M, K] that params[name] and its scales say, as a file has it: x [N, K] -> [N, M]."""
    suffix = suffix_of(name, params) or ""
    stacked = lambda t: t if t is None or t.ndim < 2 else t.mT[None]
    w = (stacked(params.get(name + end)) for end in ("", suffix, f"{suffix}_second"))
    offsets = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    return _gmm(x, *w, offsets, name, suffix, False, False, "loop")


@torch._dynamo.allow_in_graph
def _gmm(
    x: Tensor, codes: Tensor, scale: Tensor, second: Tensor | None, offsets: Tensor, name: str, suffix: str,
    alternate: bool, turned: bool, by: str,
) -> Tensor:  # fmt: skip
    given = x, codes, scale, second, offsets, name, suffix, alternate, turned, by
    return _multiply(*given) if _alone(x, codes, scale) else _Gmm.apply(*given)


def _alone(*tensors: Tensor) -> bool:
    return unwatched(*tensors) and not torch.is_autocast_enabled(tensors[0].device.type)


def _multiply(
    x: Tensor, codes: Tensor, scale: Tensor, second: Tensor | None, offsets: Tensor, name: str, suffix: str,
    alternate: bool, turned: bool, by: str,
) -> Tensor:  # fmt: skip
    w = replace(held(codes, scale, second, name, suffix, alternate, x.dtype), turned=turned)
    by = "loop" if x.dtype == torch.float64 or (by == "torch_mm" and x.device.type == "cpu") else by
    if by == "triton" and (tiles := in_tiles(w)) is not None:
        return fmoe_kernels.products.gmm_codes(x, tiles, offsets)
    out, start = empty((x.shape[0], w.shape[2]), x), 0
    for e, end in enumerate(offsets.tolist()):
        if start < end:
            out[start:end] = RAW[by].gmm(x[start:end], w[e][None], (offsets[e : e + 1] - start).int())
        start = end
    return out


def in_tiles(w: Codes) -> Any:
    """The same matrices for the kernel that decodes tile by tile; None where it does not know the format."""
    f, M = w.format, w.codes.shape[2]
    if any(side & (side - 1) for side in f.block):
        return None
    bytes_ = lambda t: t.view(torch.uint8) if t.dtype.itemsize == 1 else t
    scale = w.spread(w.scale) if f.block[0] == 1 else w.scale
    second = None if w.second is None else w.spread(w.second)
    second = second if second is None or f.zeros else second.float().expand(-1, 1, M)
    how = dict(divides=f.divides, late=f.late, turned=w.turned)
    code = "signed" if f.code == "int8" and f.stored == torch.int8 else f.code
    from fmoe_kernels.programs import codes as kernel  # on first use: it imports triton

    return kernel.Coded(bytes_(w.codes), bytes_(scale), second, code, f.block[::-1], **how)


@torch.library.custom_op("fmoe::gmm_codes", mutates_args=())
def gmm_codes_op(
    x: Tensor, codes: Tensor, scale: Tensor, second: Tensor | None, offsets: Tensor, name: str, suffix: str,
    alternate: bool, turned: bool, by: str,
) -> Tensor:  # fmt: skip
    """`gmm` without autograd. turned: by the transposed matrices."""
    with torch.autocast(x.device.type, enabled=False):
        return _multiply(x, codes, scale, second, offsets, name, suffix, alternate, turned, by)


@gmm_codes_op.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, second: Any, offsets: Tensor, name: str, suffix: str, alternate: bool,
      turned: bool, by: str) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], codes.shape[1] * packed(suffix, codes.dtype) if turned else codes.shape[2])


@formula(torch.ops.fmoe.gmm_codes)
def _(x: list[int], codes: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * out_shape[1]


class _Gmm(Function):
    """Linear in x, whose transpose is itself with the matrices turned; constant in all else."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _multiply(*args) if _alone(*args[:3]) else gmm_codes_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.name, ctx.suffix, ctx.alternate, ctx.turned, ctx.by = inputs[1:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        how = ctx.name, ctx.suffix, ctx.alternate, not ctx.turned, ctx.by
        dx = _gmm(dy, *ctx.saved_tensors, *how) if ctx.needs_input_grad[0] else None
        return dx, *[None] * 9

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _Gmm.apply(dx, *ctx.saved_tensors, ctx.name, ctx.suffix, ctx.alternate, ctx.turned, ctx.by)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Gmm, info, in_dims, args)
