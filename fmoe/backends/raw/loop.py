"""The reference products: one expert after the other, plain torch. Every other backend must agree with them.

Raw products, without autograd: `products.py` adds that. They wait for the device, to read where each expert ends, and
touch no expert without rows. Weights are read as they are stored, in either order and any dtype.
"""

import torch
from torch import Tensor

from fmoe.backends.raw.memory import empty, zeros


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ w[e] for the rows n of expert e: x [N, K], w [E, K, M] -> [N, M] in x's dtype.

    offsets [E] int32: where the rows of each expert end. Rows after the last end are unspecified.

    >>> gmm(torch.tensor([[2.0], [3.0]]), torch.tensor([[[1.0]], [[5.0]], [[10.0]]]), torch.tensor([1, 1, 2]))
    tensor([[ 2.],
            [30.]])
    """
    out, multiply = empty((x.shape[0], w.shape[2]), x), _in_fp32 if widens(x) else _mm
    sizes = [end - start for start, end in _ranges(offsets)]
    used = [e for e, n in enumerate(sizes) if n]
    # one call makes all the slices: a slice at a time costs what a small product does
    parts = [*(sizes[e] for e in used), x.shape[0] - sum(sizes)]
    for e, rows, place in zip(used, x.split(parts), out.split(parts), strict=False):
        multiply(rows, w[e] if w.dtype == x.dtype else w[e].to(x.dtype), place)
    return out


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = the sum of x[n]^T y[n] over the rows n of expert e: x [N, K], y [N, M] -> [E, K, M]; 0 without rows.

    A sum over rows alone (K = 1: the gradient of a bias) is taken in fp64.

    >>> tgmm(torch.tensor([[2.0], [3.0]]), torch.ones(2, 1), torch.tensor([0, 2])).flatten().tolist()
    [0.0, 5.0]
    """
    out, wide = zeros((offsets.shape[0], x.shape[1], y.shape[1]), x), widens(x)
    for e, (start, end) in enumerate(_ranges(offsets)):
        a, b = x[start:end], y[start:end]
        if start < end and x.shape[1] == 1:
            out[e, 0] = (a.double() * b).sum(0)
        elif start + 1 == end:
            torch.mul(a.mT, b, out=out[e])
        elif start < end and wide:
            out[e] = torch.mm(a.float().mT, b.float())
        elif start < end:
            torch.mm(a.mT, b, out=out[e])
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


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
