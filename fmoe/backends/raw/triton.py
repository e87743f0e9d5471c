"""Products by `fmoe_kernels`: sorted rows, and nothing waits for the device."""

import fmoe_kernels
from torch import Tensor


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """As `loop.gmm`, of fp16, bf16 and fp32."""
    return fmoe_kernels.products.gmm(x, w, offsets)


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """As `loop.tgmm`, of fp16, bf16 and fp32."""
    return fmoe_kernels.products.tgmm(x, y, offsets)
