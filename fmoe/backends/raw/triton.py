"""Products by `fmoe_kernels`: sorted rows, and nothing waits for the device. They take no fp64: that is `loop`'s."""

import fmoe_kernels
import torch
from torch import Tensor

from fmoe.backends.raw import loop


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """As `loop.gmm`."""
    return loop.gmm(x, w, offsets) if x.dtype == torch.float64 else fmoe_kernels.products.gmm(x, w.to(x.dtype), offsets)


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """As `loop.tgmm`."""
    return loop.tgmm(x, y, offsets) if x.dtype == torch.float64 else fmoe_kernels.products.tgmm(x, y, offsets)
