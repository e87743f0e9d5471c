"""Products by `torch.nn.functional.grouped_mm`: one call for all experts, and on a GPU no wait for the device.

It takes bf16, fp16 and fp32 whose rows start at multiples of 16 bytes: what does not is padded with zeros here. fp64,
which it does not take, and all on a CPU, where it is a loop over experts itself, run as in `loop.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.backends.raw import loop


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """As `loop.gmm`.

    >>> gmm(torch.tensor([[2.0], [3.0]]), torch.tensor([[[1.0]], [[5.0]], [[10.0]]]), torch.tensor([1, 1, 2]).int())
    tensor([[ 2.],
            [30.]])
    """
    if x.dtype == torch.float64 or x.device.type == "cpu":
        return loop.gmm(x, w, offsets)
    x, w, M = _padded(x, 1), _padded(w.to(x.dtype), 2), w.shape[2]
    return _own(F.grouped_mm(_aligned(x), _aligned(w), offs=offsets)[:, :M])


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """As `loop.tgmm`; on a GPU, sums over rows alone are fp32."""
    if x.dtype == torch.float64 or x.device.type == "cpu":
        return loop.tgmm(x, y, offsets)
    K, M = x.shape[1], y.shape[1]
    return _own(F.grouped_mm(_aligned(_padded(x, 1)).mT, _aligned(_padded(y, 1)), offs=offsets)[:, :K, :M])


def _padded(t: Tensor, dims: int) -> Tensor:
    """t with its last `dims` sizes brought to multiples of 16 bytes."""
    short = [-size % (16 // t.itemsize) for size in t.shape[-dims:]]
    return F.pad(t, [n for pad in reversed(short) for n in (0, pad)]) if any(short) else t


def _aligned(t: Tensor) -> Tensor:
    """t, or a contiguous copy where it does not start, step and lie densely as grouped_mm demands."""
    *batch, row, column = t.stride()
    dense = (column == 1 and row >= t.shape[-1]) or (t.ndim == 3 and row == 1 and column >= t.shape[-2])
    steps = all(s * t.itemsize % 16 == 0 for s in (*batch, max(row, column)))
    return t if dense and steps and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _own(t: Tensor) -> Tensor:
    """t in memory of its own: an operator may not return a view."""
    return t.contiguous()
