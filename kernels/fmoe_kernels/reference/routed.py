"""A routing as a list of slots sorted by expert, and for each expert the end of its rows.

A routing is T * K slots, slot t * K + k sending token t to one expert. Experts multiply rows in expert order.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

from fmoe_kernels.host.check import BOOL, ENDS, INTEGERS, LONG, WIDE, check, check_index

Given = Mapping[str, tuple[Any, str, tuple[torch.dtype, ...]]]


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
    given: Given = {"indices": (indices, "T K", INTEGERS), "weights": (weights, "T K", WIDE)}
    check("reference.route", {**given, **({} if mask is None else {"mask": (mask, "T", BOOL)})})
    check_index("reference.route", "n_experts", n_experts, 1, "how many experts are here")
    check_index("reference.route", "start", start, 0, "the id of the first of them")
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


def check_rows(who: str, given: Given, r: Routed) -> dict[str, int]:
    """The sizes of what is given and of a Routed beside it, or ValueError: also for ends that are not of its counts."""
    if not isinstance(r, Routed):
        raise ValueError(f"{who}: r is of type {type(r).__name__}, expected what reference.route returns")
    slots = {"r.token_ids": (r.token_ids, "N", LONG), "r.slot_ids": (r.slot_ids, "N", LONG)}
    sums = {"r.counts": (r.counts, "E", LONG), "r.offsets": (r.offsets, "E", ENDS)}
    sizes = check(who, {**given, **slots, "r.weights": (r.weights, "N", WIDE), **sums})
    check_ends(who, r.offsets, sizes["N"])
    counts, ends = r.counts.tolist(), r.offsets.tolist()
    if [*accumulate(counts)] != ends or ends[-1:] != [sizes["N"]]:
        told = f"{counts} beside offsets {ends}, expected their steps, up to N={sizes['N']}"
        raise ValueError(f"{who}: r.counts is {told}")
    return sizes


def check_ends(who: str, offsets: Tensor, n: int) -> None:
    """Raises ValueError where the ends of rows fall, or lie outside [0, n]."""
    found = offsets.tolist()
    if found and (found != sorted(found) or found[0] < 0 or found[-1] > n):
        raise ValueError(f"{who}: offsets is {found}, expected ends of rows, which rise within 0..{n}")


def check_places(who: str, name: str, places: Tensor, n: int) -> None:
    """Raises ValueError where places are not in [0, n), if they are on a CPU and have data that can be looked at."""
    if places.is_cpu and places.numel() and not (is_fake(places) or is_functorch_wrapped_tensor(places)):
        least, most = int(places.min()), int(places.max())
        if least < 0 or most >= n:
            raise ValueError(f"{who}: {name} is from {least} to {most}, expected from 0 to {n - 1}")


def eager() -> bool:
    """Whether sizes can be compared: a compiler does not know how many rows there are. What goes in, it checks."""
    return not torch.compiler.is_compiling()
