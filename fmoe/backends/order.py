"""Which rows the host gives to which expert, and in which parts a core takes them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmoe.backends.raw.loop import at_once
from fmoe.dispatch.moves import added, summed

PART = 512
"""Rows from which on the experts that have them are a part: 1 MB of 1,024 columns in bf16."""
FEW = 512
"""Slots, up to which torch orders them in less time than numpy: 0.1 ms against 0.2 of 32, 0.9 against 0.2 of 32,768."""


class Order(NamedTuple):
    """Row n is of slot[n] = t K + k, of token[n] = t; slot s has row back[s]; sizes: rows of each expert with any.

    No slot, token and back: rows are the slots of one token as they come, no two of one expert.
    """

    sizes: dict[int, int]
    slot: Tensor | None = None
    token: Tensor | None = None
    back: Tensor | None = None

    def rows(self, x: Tensor, part: slice | None) -> Tensor:
        """Row n: x[token[n]], of a part of the rows; x [T, D], and of one token x itself, the row of all."""
        return x if self.token is None else x.index_select(0, of(self.token, part))

    def weights(self, weights: Tensor, x: Tensor, narrow: bool = False) -> Tensor:
        """The weight [N, 1] of each row, in fp32 or wider; weights [T, K].

        narrow: in x's dtype if they have it. A product with x's is rounded once then, and is that of fp32, rounded.
        """
        wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
        if narrow and weights.dtype == x.dtype:
            wide = x.dtype
        w = weights.mT if self.slot is None else weights.flatten().index_select(0, self.slot)[:, None]
        return w if w.dtype == wide else w.to(wide)

    def added(self, rows: Tensor, K: int, dtype: torch.dtype) -> Tensor:
        """The sum [T, D] of the rows of each token, in fp32 (fp64 stays), rounded to a dtype."""
        if self.back is None:
            y = summed(rows[None], torch.promote_types(rows.dtype, torch.float32))
            return y if y.dtype == dtype else y.to(dtype)
        return added(rows, self.back, K, dtype)

    def slots(self, rows: Tensor) -> Tensor:
        """out[s]: the row of slot s."""
        return rows if self.back is None else rows.index_select(0, self.back)


def ordered(indices: Tensor, E: int, sort: bool = False) -> Order | None:
    """The slots of indices [T, K], sorted by expert and otherwise in order; None where one goes nowhere, or of none.

    sort: those of a single token too.

    >>> ordered(torch.tensor([[1, 0], [1, 1]]), 2)
    Order(sizes={0: 1, 1: 3}, slot=tensor([1, 0, 2, 3]), token=tensor([0, 0, 1, 1]), back=tensor([1, 0, 2, 3]))
    >>> ordered(torch.tensor([[1, 0]]), 2)
    Order(sizes={1: 1, 0: 1}, slot=None, token=None, back=None)
    """
    T, K = indices.shape
    if T == 1 and not sort:
        (told,) = indices.tolist()
        if told and min(told) >= 0 and max(told) < E and len({*told}) == K:
            return Order(dict.fromkeys(told, 1))
    if T * K <= FEW:  # where a processor that reads weights forgets code, the fewest different steps cost least
        ids, slot = indices.flatten().sort(stable=True)
        sizes = dict(Counter(ids.tolist()))
        if not sizes or min(sizes) < 0 or max(sizes) >= E:
            return None
        return Order(sizes, slot, slot // K, slot.argsort())
    experts = indices.numpy().ravel()
    if experts.view(np.uint64).max() >= E:
        return None
    slots = experts.astype(np.min_scalar_type(E)).argsort(kind="stable")  # a radix sort of 16 bits
    back = np.empty_like(slots)
    back[slots] = np.arange(len(slots))
    sizes = {e: n for e, n in enumerate(np.bincount(experts).tolist()) if n}
    return Order(sizes, *map(torch.from_numpy, (slots, slots // K, back)))


def of(rows: Tensor, part: slice | None) -> Tensor:
    """A part of the rows; None: all, and no view of them."""
    return rows if part is None else rows[part]


def parts(order: Order, up: Tensor, down: Tensor, x: Tensor) -> Iterator[tuple[slice | None, dict[int, int]]]:
    """The rows of some experts at a time; all (None) where a part would not give the same bits, or costs more."""
    N = sum(order.sizes.values())
    # a vector unit rounds what is left over of 64 in its own way
    if N < 2 * PART or any(size % 64 for size in down.shape[1:]) or at_once(x, up) or at_once(x, down):
        yield None, order.sizes
        return
    start, stop, sizes = 0, 0, dict[int, int]()
    for e, n in order.sizes.items():
        stop, sizes[e] = stop + n, n
        if stop - start >= PART or stop == N:
            yield slice(start, stop), sizes
            start, sizes = stop, {}
