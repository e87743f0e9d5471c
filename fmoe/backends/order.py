"""Which rows the host gives to which expert, and in which parts a core takes them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fmoe.backends.raw.loop import at_once

FEW = 16
"""Slots that the host orders; of more, torch sorts faster."""
PART = 512
"""Rows from which on the experts that have them are a part: 1 MB of 1,024 columns in bf16."""


class Order(NamedTuple):
    """Row n is of slot[n] = t K + k, of token[n] = t; slot s has row back[s]; sizes: rows of each expert with any."""

    slot: Tensor
    token: Tensor
    back: Tensor
    sizes: dict[int, int]


def ordered(indices: Tensor, E: int) -> Order | None:
    """The slots of indices [T, K], sorted by expert and otherwise in order; None where one goes nowhere, or of none.

    >>> ordered(torch.tensor([[1, 0], [1, 1]]), 2)[1:]
    (tensor([0, 0, 1, 1]), tensor([1, 0, 2, 3]), {0: 1, 1: 3})
    """
    K, N = indices.shape[1], indices.numel()
    if N > FEW:
        ids, slot = indices.flatten().sort(stable=True)
        if ids[0] < 0 or ids[-1] >= E:
            return None
        back = torch.empty_like(slot).scatter_(0, slot, torch.arange(N))
        return Order(slot, slot // K, back, {e: n for e, n in enumerate(torch.bincount(ids).tolist()) if n})
    told = indices.flatten().tolist()
    slots = sorted(range(N), key=told.__getitem__)
    if not N or told[slots[0]] < 0 or told[slots[-1]] >= E:
        return None
    sizes: dict[int, int] = {}
    rows = [0] * N
    for row, at in enumerate(slots):
        sizes[told[at]] = sizes.get(told[at], 0) + 1
        rows[at] = row
    slot, token, back = torch.tensor([slots, [at // K for at in slots], rows]).unbind()
    return Order(slot, token, back, sizes)


def in_rows(x: Tensor, weights: Tensor, order: Order) -> Tensor:
    """The weight [N, 1] of each row, in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    return weights.flatten().index_select(0, order.slot).to(wide)[:, None]


def parts(order: Order, up: Tensor, down: Tensor, x: Tensor) -> Iterator[tuple[slice, dict[int, int]]]:
    """The rows of some experts at a time; all at once where a part would not give the same bits, or costs more."""
    N, ragged = len(order.slot), any(size % 64 for size in down.shape[1:])  # a vector unit rounds its rest on its own
    if N < 2 * PART or ragged or at_once(x, up) or at_once(x, down):
        yield slice(0, N), order.sizes
        return
    start, stop, sizes = 0, 0, dict[int, int]()
    for e, n in order.sizes.items():
        stop, sizes[e] = stop + n, n
        if stop - start >= PART or stop == N:
            yield slice(start, stop), sizes
            start, sizes = stop, {}
