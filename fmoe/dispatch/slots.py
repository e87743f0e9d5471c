"""Slots and bytes: what every dispatcher over a group does with rows before they leave and after they arrive."""

import torch
from torch import Tensor

from fmoe.dispatch.local import Plan, combine


def take(x: Tensor, w: Tensor, slots: Plan) -> tuple[Tensor, Tensor]:
    """(x[t], w[t, k]) for every slot (t, k) of the plan: x [T, D], w [T, K, J] -> [n, D], [n, J].

    >>> slots = Plan(slot_ids=torch.tensor([1, 0, 2]), counts=torch.tensor([1, 2]), n_tokens=2, k=2)
    >>> x, w = take(torch.tensor([[1.0], [2.0]]), torch.arange(4.0).view(2, 2, 1), slots)
    >>> x.flatten().tolist(), w.flatten().tolist()
    ([1.0, 1.0, 2.0], [1.0, 0.0, 2.0])
    """
    return x.index_select(0, slots.slot_ids // slots.k), w.flatten(0, 1).index_select(0, slots.slot_ids)


def put(rows: Tensor, w: Tensor, slots: Plan) -> tuple[Tensor, Tensor]:
    """The transpose of `take`: rows added up for each token in fp32 (fp64 stays), w to the slots it came from."""
    to = w.new_zeros(slots.n_tokens * slots.k, w.shape[1])
    return combine(rows, slots), to.index_copy(0, slots.slot_ids, w).unflatten(0, (slots.n_tokens, slots.k))


def packed(x: Tensor, w: Tensor) -> Tensor:
    """Row by row the bytes of x [n, D] and then those of w [n, J], uint8: one message instead of two.

    >>> x, w = torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([[1.0], [2.0]])
    >>> rows = packed(x, w)
    >>> rows.shape, unpacked(rows, x.dtype, w.dtype, 1)[1].flatten()
    (torch.Size([2, 10]), tensor([1., 2.]))
    """
    # one column counts as contiguous whatever its stride: hence as_strided
    flat = [t.contiguous().as_strided(t.shape, (t.shape[1], 1)) for t in (x, w) if t.shape[1]]
    return torch.cat([t.view(torch.uint8) for t in flat], 1)


def unpacked(rows: Tensor, x: torch.dtype, w: torch.dtype, J: int) -> tuple[Tensor, Tensor]:
    """What was packed, of these dtypes, w having J columns."""
    at = rows.shape[1] - J * w.itemsize
    # copies, since a part may start where no number of its dtype can
    own = lambda part: part.clone(memory_format=torch.contiguous_format)
    return own(rows[:, :at]).view(x), own(rows[:, at:]).view(w) if J else rows.new_empty(len(rows), 0, dtype=w)
