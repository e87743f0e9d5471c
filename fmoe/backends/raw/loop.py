"""The reference products: one expert after the other, plain torch. Every other backend must agree with them.

Raw products, without autograd: `products.py` adds that. They wait for the device, to read where each expert ends, and
touch no expert without rows. Weights are read as they are stored, in either order and any dtype.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate, repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.backends.raw.memory import empty, partly

LARGE = 1 << 19
"""Numbers of a matrix from which on its own memory, and not a call, is what a product of few rows costs."""
SOME, FEW, LONG = 8, 49, 1024
"""Rows, from which on and up to which a matrix takes less time as the first factor, and terms of each sum."""


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ w[e] for the rows n of expert e: x [N, K], w [E, K, M] -> [N, M] in x's dtype.

    offsets [E] int32: where the rows of each expert end. Rows after the last end are unspecified.

    >>> gmm(torch.tensor([[2.0], [3.0]]), torch.tensor([[[1.0]], [[5.0]], [[10.0]]]), torch.tensor([1, 1, 2]))
    tensor([[ 2.],
            [30.]])
    """
    return multiply(x, w, {e: n for e, n in enumerate(_sizes(offsets)) if n})


def multiply(x: Tensor, w: Tensor, sizes: dict[int, int], out: Tensor | None = None) -> Tensor:
    """`gmm` of the experts that have rows, in turn: how many each has. out: where to, of x's dtype.

    A single row x, of several: each expert's.
    """
    E = w.shape[0]
    if 4 * len(sizes) >= E and at_once(x, w):
        ends = torch.tensor([*accumulate(sizes.get(e, 0) for e in range(E))], dtype=torch.int32)
        y = F.grouped_mm(x.contiguous(), w, offs=ends)
        return y if out is None else out.copy_(y)
    if out is None:
        out = empty((max(x.shape[0], sum(sizes.values())), w.shape[2]), x)
    cells = zip(sizes, _each(x, sizes), _each(out, sizes), strict=False)
    if w.dtype != x.dtype or widens(x):
        for e, rows, place in cells:
            mine = w[e].to(x.dtype)
            _in_fp32(rows, mine, place) if widens(x) else torch.mm(rows, mine, out=place)
        return out
    # a matrix that is read leaves nothing else in a core's cache: all that can be done before the products is
    one, few = _turned(x, w)
    calls: list[tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]] = []
    for e, rows, place in cells:
        mine, n = w.select(0, e), rows.shape[0]
        if n == 1 and one:
            calls.append((torch.mv, mine.mT, rows[0], place[0]))
        elif n in few:
            calls.append((_mm_turned, mine.mT, rows.mT, place.mT))
        else:
            calls.append((torch.mm, rows, mine, place))
    for by, a, b, c in calls:
        by(a, b, out=c)
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
    sizes = _sizes(offsets)
    out = partly((len(sizes), K, M), x, sizes)
    outer(x, y, {e: n for e, n in enumerate(sizes) if n}, out)
    return out


def outer(x: Tensor, y: Tensor, sizes: dict[int, int], out: Tensor) -> None:
    """`tgmm` of the experts that have rows, in turn, into out [E, K, M]. A single row, of several: each expert's."""
    wide = widens(x)
    for (e, n), a, b in zip(sizes.items(), _each(x, sizes), _each(y, sizes), strict=False):
        place = out.select(0, e)
        if x.shape[1] == 1:
            place[0] = (a.double() * b).sum(0)
        elif n == 1:
            torch.mul(a.mT, b, out=place)
        elif wide:
            place.copy_(torch.mm(a.float().mT, b.float()))
        else:
            torch.mm(a.mT, b, out=place)


def _each(x: Tensor, sizes: dict[int, int]) -> Iterable[Tensor]:
    """The rows of each expert, and what is left, in one call: a slice at a time costs what a small product does."""
    parts, left = [*sizes.values()], x.shape[0] - sum(sizes.values())
    if left < 0 and x.shape[0] == 1:
        return repeat(x)
    return x.split_with_sizes([*parts, left] if left else parts)


def widens(x: Tensor) -> bool:
    """Does a product in x's dtype run in fp32 and round once? On a CPU whose units know no 16 bits it is 3 to 80 times
    as fast as torch's own (measured), and no less exact."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    amx = torch.cpu._is_amx_fp16_supported() if x.dtype == torch.float16 else torch.cpu._is_amx_tile_supported()
    return not (amx or (x.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()))


def _turned(x: Tensor, w: Tensor) -> tuple[bool, range]:
    """Whether one row, and how many, take less time with the matrix as the first factor, of what was measured.

    Files have it [out, in]. A matrix unit wants what it multiplies by in an order of its own: the first factor it reads
    as it lies, in 0.7 of the time. MKL packs what it multiplies by from some rows on, which takes 1.1 to 1.6 times.
    """
    if w.stride(1) == 1 and x.is_cpu:
        if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            return True, range(2, FEW)
        if x.dtype == torch.float32 and w.shape[1] >= LONG and torch.cpu._is_avx512_supported():
            return False, range(SOME, FEW)
    return False, range(0)


def _mm_turned(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """torch.mm, which given an `out` of columns would turn both factors round."""
    return out.copy_(torch.mm(a, b))


def _in_fp32(x: Tensor, w: Tensor, out: Tensor) -> None:
    if len(x) > 2:
        out.copy_(x.float() @ w.float())
        return
    for row, y in zip(x, out, strict=True):  # reads 16 bits, adds in fp32
        torch.mv(w.mT, row, out=y)


def at_once(x: Tensor, w: Tensor) -> bool:
    """Are these matrices so small that one product of all of them costs less than one for each?"""
    K, M = w.shape[1:]
    return K * M < LARGE and _at_once(x, K, M, w if w.stride(2) == 1 else w.mT)


def _at_once(x: Tensor, K: int, M: int, other: Tensor) -> bool:
    """Do matrices [K, M] cost less than a call for each, and does torch take all of these in one?"""
    if K * M >= LARGE or x.device.type != "cpu" or x.dtype != other.dtype or x.dtype == torch.float64 or widens(x):
        return False
    return not any(n * x.itemsize % 16 for n in (K, M)) and other.is_contiguous() and other.data_ptr() % 16 == 0


def _sizes(offsets: Tensor) -> list[int]:
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
