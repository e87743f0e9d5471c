"""The backend `triton_fp8`: products in e4m3, as DeepSeek-V3 trains, on weights in e4m3 or quantised as they come.

A checkpoint loaded with `quantized="keep"` multiplies as it is: `gate_and_up_projs` and `down_projs` in e4m3, each
beside its `_scale_inv`. Weights of any other dtype are quantised per 128x128 block at each call, and their gradients
are products in high precision. Rows and the gradients of rows are quantised per 1x128.
"""

from typing import Any

import torch
from fmoe_kernels.host.batch import one_by_one
from fmoe_kernels.host.flops import formula
from fmoe_kernels.host.function import Function
from fmoe_kernels.programs import fp8 as kernels
from torch import Tensor

from fmoe.backends.held import WEIGHTS
from fmoe.backends.mlp import mlp
from fmoe.backends.products import tgmm_op
from fmoe.codecs.stacks import is_code
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

SCALE = "_scale_inv"


def triton_fp8(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """`mlp` with both products of weights in e4m3, sums in fp32; biases and LoRA as the backend `triton` has them."""
    if rows.x.dtype == torch.float64:
        raise ValueError("backend 'triton_fp8': x is float64, expected float16, bfloat16 or float32")
    _check_scales(params)

    def weigh(h: Tensor, name: str, offsets: Tensor) -> Tensor:
        w = params[name]
        if w.dtype == kernels.E4M3:
            return _gmm(h, w, params[name + SCALE].float(), None, offsets)
        return _gmm(h, *quantize_blocks(w.detach()), w.to(h.dtype), offsets)

    return mlp(params, rows, config, by="triton", weigh=weigh)


def takes(params: Params) -> bool:
    """Whether the weights that are codes are e4m3 in blocks of 128x128, each with a floating scale."""
    held = [(params[n], params.get(n + SCALE)) for n in WEIGHTS if n in params and is_code(params[n])]
    grid = lambda w: [len(w), *(-(-n // 128) for n in w.shape[1:])]
    return all(
        w.dtype == kernels.E4M3 and s is not None and not is_code(s) and list(s.shape) == grid(w) for w, s in held
    )


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s) with q * s = w to e4m3, a scale for each 128x128 block of w [E, K, M]: q e4m3, strided as w, s fp32.

    s is the largest magnitude of its block over 448, and 1 where that is zero.
    """
    E, K, M = w.shape
    blocks = -(-K // 128), -(-M // 128)
    most = w.new_zeros(E, blocks[0] * 128, blocks[1] * 128)
    most[:, :K, :M] = w.abs()
    most = most.view(E, blocks[0], 128, blocks[1], 128).nan_to_num(nan=0.0).amax((2, 4)).float()
    s = torch.where(most > 0, most / 448, 1.0)
    spread = s.repeat_interleave(128, 1)[:, :K].repeat_interleave(128, 2)[:, :, :M]
    return (w.float() / spread).to(kernels.E4M3), s


def _check_scales(params: Params) -> None:
    for name, w in params.items():
        if w.dtype == kernels.E4M3:
            s, expected = params.get(name + SCALE), [len(w), *(-(-n // 128) for n in w.shape[1:])]
            found = "missing" if s is None else f"{list(s.shape)}"
            if s is None or list(s.shape) != expected:
                raise ValueError(
                    f"backend 'triton_fp8': {name + SCALE!r} is {found}, expected {expected}: a scale for each 128x128"
                    f" block of {name!r} {list(w.shape)} in e4m3"
                )


@torch.library.custom_op("fmoe::gmm_fp8", mutates_args=())
def gmm_fp8_op(x: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ (w[e] * w_scale[e]), x quantised, without autograd: [N, M] in x's dtype."""
    return kernels.gmm(x, w, w_scale, offsets)


@gmm_fp8_op.register_fake
def _(x: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@formula(torch.ops.fmoe.gmm_fp8)
def _(x: list[int], w: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * w[2]


@torch._dynamo.allow_in_graph
def _gmm(x: Tensor, w: Tensor, w_scale: Tensor, master: Tensor | None, offsets: Tensor) -> Tensor:
    return _Gmm.apply(x, w, w_scale, master, offsets)


class _Gmm(Function):
    """master: what w was quantised from, or None; its gradient is that of an unquantised product."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, w_scale: Tensor, master: Tensor | None, offsets: Tensor) -> Tensor:
        return gmm_fp8_op(x, w, w_scale, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, w_scale, master, offsets = inputs
        ctx.save_for_backward(x if master is not None else None, w, w_scale, offsets)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, w_scale, offsets = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
        dx, dw = _Backward.apply(dy, x, w, w_scale, offsets, needs)
        return dx if needs[0] else None, None, None, dw if needs[1] else None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "backend 'triton_fp8': forward mode, which torch.func.hessian takes, is not implemented;"
            " use the backend 'loop'"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Gmm, info, in_dims, args)


class _Backward(Function):
    @staticmethod
    def forward(
        dy: Tensor, x: Tensor | None, w: Tensor, w_scale: Tensor, offsets: Tensor, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        dx = gmm_fp8_op(dy, w.mT, w_scale.mT, offsets) if needs[0] else dy.new_empty(0)
        dw = tgmm_op(x, dy, offsets, "triton") if needs[1] and x is not None else dy.new_empty(0)
        return dx, dw

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("backend 'triton_fp8': the derivative of a derivative; use the backend 'loop'")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Backward, info, in_dims, args)
