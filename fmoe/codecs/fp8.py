"""FP8 in 128x128 blocks as two functions: `X.weight` in e4m3 beside `X.weight_scale_inv`, one factor for each block."""

from dataclasses import replace

import torch
from torch import Tensor

from fmoe.codecs.formats import FORMATS
from fmoe.codecs.values import E4M3

__all__ = ["E4M3", "SUFFIX", "dequantize", "grid", "quantize"]

SUFFIX = "_scale_inv"


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, block: int = 128) -> Tensor:
    """w[r, c] = float(weight[r, c]) * float(scale[r // block, c // block]) in fp32, rounded to dtype.

    weight [.., R, C] e4m3, scale [.., ceil(R / block), ceil(C / block)]. Raises ValueError for another shape of scale,
    and as `Format.decode`. Source: DeepSeek-V3's `weight_scale_inv`.

    >>> dequantize(torch.ones(2, 3).to(E4M3), torch.tensor([[0.5]]), torch.float32)
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    return replace(FORMATS["fp8 blocks"], block=(block, block)).decode(weight, scale, dtype)


def quantize(weight: Tensor, scale: Tensor | None = None, block: int = 128) -> tuple[Tensor, Tensor]:
    """(q, s) with dequantize(q, s) nearest to weight: |q * s - w| <= 2^-4 |w| + 2^-10 s in every block.

    weight [.., R, C] floating; scale: one to use again in every block where it gives weight back exactly, such as the
    one that weight was decoded with. New scales are amax / 448 in fp32, rounded to seven bits, so that (q, s) comes
    back from what is decoded, also without s, and |q * s - w| is at most 3.7 % of amax. Returns (q e4m3, s). NaN stays
    NaN and counts for no scale. Raises ValueError for an infinity: e4m3 has none.

    >>> q, s = quantize(torch.tensor([[224.0, -3.0]]))
    >>> dequantize(q, s, torch.float32), s
    (tensor([[224.,  -3.]]), tensor([[0.5000]]))
    """
    return replace(FORMATS["fp8 blocks"], block=(block, block)).encode(weight, scale)


def grid(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """How many blocks cover each dimension."""
    return tuple(-(-n // block) for n in shape)
