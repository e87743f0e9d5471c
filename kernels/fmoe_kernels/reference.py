"""The eager twin of every kernel here: slow, plain torch, and the specification.

A routing is T * K slots, slot t * K + k sending token t to one expert. Experts multiply rows in expert order, so a
routing becomes a list of slots sorted by expert, and for each expert the end of its rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """Row n is slot slot_ids[n] of token token_ids[n]; the rows of expert e end before offsets[e].

    token_ids, slot_ids [N] int64. weights [N] fp32 or fp64. counts [E] int64. offsets [E] int32, the inclusive
    running sum of counts, so offsets[-1] == N.
    """

    token_ids: Tensor
    slot_ids: Tensor
    weights: Tensor
    counts: Tensor
    offsets: Tensor


def route(indices: Tensor, weights: Tensor, mask: Tensor | None, n_experts: int, start: int = 0) -> Routed:
    """The slots whose expert is in [start, start + n_experts), sorted by expert; slots of one expert keep their order.

    indices [T, K] integer, global expert ids. weights [T, K]; they come back in fp32 (fp64 stays) and differentiate.
    mask [T] bool or None: slots of a token whose mask is False are dropped, as are ids outside the range (such as -1).
    The number of rows N depends on the data, which waits for the device.

    Experts 4 and 5 of a layer; token 2 is masked:

    >>> indices = torch.tensor([[0, 5], [5, 4], [7, 5]])
    >>> rows = route(indices, torch.ones(3, 2), torch.tensor([True, True, False]), n_experts=2, start=4)
    >>> rows.token_ids.tolist(), rows.slot_ids.tolist(), rows.counts.tolist(), rows.offsets.tolist()
    ([1, 0, 1], [3, 1, 2], [1, 2], [1, 3])
    """
    local = indices.long() - start
    keep = (local >= 0) & (local < n_experts)
    if mask is not None:
        keep = keep & mask[:, None]
    slots = keep.flatten().nonzero().squeeze(1)
    ids, order = local.flatten()[slots].sort(stable=True)
    slot_ids = slots[order]
    # a search, not a histogram: no atomics on any device
    offsets = torch.searchsorted(ids, torch.arange(n_experts, device=ids.device), right=True, out_int32=True)
    counts = offsets.long().diff(prepend=offsets.new_zeros(1, dtype=torch.int64))
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    # every slot is read at most once, so the transpose of this gather adds nothing twice
    rows = wide.flatten().index_select(0, slot_ids)
    return Routed(slot_ids // max(indices.shape[1], 1), slot_ids, rows, counts, offsets)
