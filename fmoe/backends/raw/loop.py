"""The reference products: one expert after the other, plain torch. Every other backend must agree with them.

Raw products, without autograd: `products.py` adds that. They wait for the device, to read where each expert ends.
"""

import torch
from torch import Tensor


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ w[e] for the rows n of expert e: x [N, K], w [E, K, M] of x's dtype -> [N, M].

    offsets [E] int32: where the rows of each expert end. Rows after the last end are unspecified.

    >>> gmm(torch.tensor([[2.0], [3.0]]), torch.tensor([[[1.0]], [[5.0]], [[10.0]]]), torch.tensor([1, 1, 2]))
    tensor([[ 2.],
            [30.]])
    """
    out = x.new_empty(x.shape[0], w.shape[2])
    for e, (start, end) in enumerate(_ranges(offsets)):
        if start < end:
            torch.mm(x[start:end], in_one_order(w[e]) if few(x, w) else w[e], out=out[start:end])
    return out


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = the sum of x[n]^T y[n] over the rows n of expert e: x [N, K], y [N, M] -> [E, K, M]; 0 without rows.

    A sum over rows alone (K = 1: the gradient of a bias) is taken in fp64.

    >>> tgmm(torch.tensor([[2.0], [3.0]]), torch.ones(2, 1), torch.tensor([0, 2])).flatten().tolist()
    [0.0, 5.0]
    """
    out = x.new_zeros(offsets.shape[0], x.shape[1], y.shape[1])
    for e, (start, end) in enumerate(_ranges(offsets)):
        if start < end and x.shape[1] == 1:
            out[e, 0] = (x[start:end].double() * y[start:end]).sum(0)
        elif start < end:
            torch.mm(x[start:end].mT, y[start:end], out=out[e])
    return out


def few(x: Tensor, w: Tensor) -> bool:
    """Are there fewer rows than experts, so that some expert has none?"""
    return x.shape[0] < w.shape[0]


def in_one_order(w: Tensor) -> Tensor:
    """w [.., K, M] as checkpoints store it, [.., M, K], copied if need be.

    BLAS rounds another order differently, and strides must not show in a result. All experts are brought to this order
    before they multiply; where rows are few only those that are used are, here.
    """
    return w.mT.contiguous().mT


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
