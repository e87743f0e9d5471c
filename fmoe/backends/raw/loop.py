"""The reference products: one expert after the other, plain torch. Every other backend must agree with them.

Raw products, without autograd: `products.py` adds that. They wait for the device, to read where each expert ends, and
touch no expert without rows. Weights are read as they are stored, in either order and any dtype.
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.backends.raw.memory import empty, partly

LARGE = 1 << 19
"""Numbers of a matrix from which on its own memory, and not a call, is what a product of few rows costs."""


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ w[e] for the rows n of expert e: x [N, K], w [E, K, M] -> [N, M] in x's dtype.

    offsets [E] int32: where the rows of each expert end. Rows after the last end are unspecified.

    >>> gmm(torch.tensor([[2.0], [3.0]]), torch.tensor([[[1.0]], [[5.0]], [[10.0]]]), torch.tensor([1, 1, 2]))
    tensor([[ 2.],
            [30.]])
    """
    return multiply(x, w, {e: n for e, n in enumerate(_sizes(offsets)) if n})


def multiply(x: Tensor, w: Tensor, sizes: dict[int, int]) -> Tensor:
    """`gmm` of the experts that have rows, in turn: how many each has."""
    E = w.shape[0]
    if 4 * len(sizes) >= E and _at_once(x, w.shape[1], w.shape[2], w if w.stride(2) == 1 else w.mT):
        ends = torch.tensor([*accumulate(sizes.get(e, 0) for e in range(E))], dtype=torch.int32)
        return F.grouped_mm(x.contiguous(), w, offs=ends)
    out, by = empty((x.shape[0], w.shape[2]), x), _in_fp32 if widens(x) else _mm
    # one call makes all the slices: a slice at a time costs what a small product does
    parts = [*sizes.values(), x.shape[0] - sum(sizes.values())]
    for e, rows, place in zip(sizes, x.split_with_sizes(parts), out.split_with_sizes(parts), strict=False):
        mine = w.select(0, e)
        by(rows, mine if w.dtype == x.dtype else mine.to(x.dtype), place)
    return out


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = the sum of x[n]^T y[n] over the rows n of expert e: x [N, K], y [N, M] -> [E, K, M]; 0 without rows.

    A sum over rows alone (K = 1: the gradient of a bias) is taken in fp64.

    >>> tgmm(torch.tensor([[2.0], [3.0]]), torch.ones(2, 1), torch.tensor([0, 2])).flatten().tolist()
    [0.0, 5.0]
    """
    K, M = x.shape[1], y.shape[1]
    if K > 1 and _at_once(x, K, M, y):
        return F.grouped_mm(x.contiguous().mT, y, offs=offsets.int())
    sizes, wide = _sizes(offsets), widens(x)
    out = partly((len(sizes), K, M), x, sizes)
    large = x.is_cpu and K * M >= LARGE
    parts = [*sizes, x.shape[0] - sum(sizes)]
    for n, a, b, place in zip(sizes, x.split_with_sizes(parts), y.split_with_sizes(parts), out.unbind(), strict=False):
        if not n:
            continue
        if K == 1:
            place[0] = (a.double() * b).sum(0)
        elif n == 1:
            torch.mul(a.mT, b, out=place)
        elif wide:
            place.copy_(torch.mm(a.float().mT, b.float()))
        elif large and a.dtype == torch.float32 and n < 16:
            _outer(a, b, place)
        else:
            torch.mm(a.mT, b, out=place)
    return out


def widens(x: Tensor) -> bool:
    """Does a product in x's dtype run in fp32 and round once? On a CPU whose units know no 16 bits it is 3 to 80 times
    as fast as torch's own (measured), and no less exact."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    amx = torch.cpu._is_amx_fp16_supported() if x.dtype == torch.float16 else torch.cpu._is_amx_tile_supported()
    return not (amx or (x.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()))


def _mm(x: Tensor, w: Tensor, out: Tensor) -> None:
    torch.mm(x, w, out=out)


def _in_fp32(x: Tensor, w: Tensor, out: Tensor) -> None:
    if len(x) > 2:
        out.copy_(x.float() @ w.float())
        return
    for row, y in zip(x, out, strict=True):  # reads 16 bits, adds in fp32
        torch.mv(w.mT, row, out=y)


def _at_once(x: Tensor, K: int, M: int, other: Tensor) -> bool:
    """Do matrices [K, M] cost less than a call for each, and does torch take all of these in one?"""
    if K * M >= LARGE or x.device.type != "cpu" or x.dtype != other.dtype or x.dtype == torch.float64 or widens(x):
        return False
    return not any(n * x.itemsize % 16 for n in (K, M)) and other.is_contiguous() and other.data_ptr() % 16 == 0


def _outer(x: Tensor, y: Tensor, out: Tensor) -> None:
    """x^T @ y of 2 to 15 rows in fp32: row by row up to 8, of more with zeros to make 16, as MKL has it fast."""
    if len(x) > 8:
        more = (0, 0, 0, 16 - len(x))
        torch.mm(F.pad(x, more).mT, F.pad(y, more), out=out)
        return
    torch.mul(x[0, :, None], y[0], out=out)
    for a, b in zip(x[1:].unbind(), y[1:].unbind(), strict=True):
        out.addcmul_(a[:, None], b)


def _sizes(offsets: Tensor) -> list[int]:
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
