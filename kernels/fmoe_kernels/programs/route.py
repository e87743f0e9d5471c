"""Routing on the device: a stable counting sort of slots by expert, without atomics and without waiting for the host.

Slot s = t * top_k + k sends token t to expert indices[t, k]. A slot is dropped when its token is masked or its expert
is not in [start, start + E). Three passes: count each block's slots per expert; add up the blocks of each expert;
place every slot behind those before it. The eager twin is `reference.route`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fmoe_kernels.host.check import BOOL, INTEGERS, check, check_index
from fmoe_kernels.host.launch import check_runs, run


@triton.jit
def load_experts(indices, mask, slot, n_slots, top_k, start, E, MASKED: tl.constexpr):
    """The local expert of each slot, -1 where it is dropped."""
    inside = slot < n_slots
    local = tl.load(indices + slot, mask=inside, other=-1).to(tl.int64) - start
    keep = inside & (local >= 0) & (local < E)
    if MASKED:
        keep = keep & (tl.load(mask + slot // top_k, mask=inside, other=0) != 0)
    return tl.where(keep, local, -1).to(tl.int32)


# sizes that change from call to call are plain numbers to the compiler: one binary serves all of them
@triton.jit(do_not_specialize=["n_slots", "top_k", "start", "E", "n_blocks"])
def count_kernel(
    indices, mask, counts, n_slots, top_k, start, E, n_blocks,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """counts[e, b] = the slots of block b that go to expert e."""
    b = tl.program_id(0)
    expert = load_experts(indices, mask, b * BLOCK + tl.arange(0, BLOCK), n_slots, top_k, start, E, MASKED)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        hits = (expert[:, None] == e[None, :]).to(tl.int32)
        tl.store(counts + e.to(tl.int64) * n_blocks + b, tl.sum(hits, 0), mask=e < E)


@triton.jit(do_not_specialize=["n_blocks"])
def scan_kernel(counts, totals, n_blocks, BLOCK: tl.constexpr):
    """counts[e, b] becomes the slots of e in the blocks before b; totals[e] their sum."""
    e = tl.program_id(0).to(tl.int64)
    before = tl.zeros([], tl.int32)
    for first in range(0, n_blocks, BLOCK):
        b = first + tl.arange(0, BLOCK)
        here = tl.load(counts + e * n_blocks + b, mask=b < n_blocks, other=0)
        tl.store(counts + e * n_blocks + b, before + tl.cumsum(here) - here, mask=b < n_blocks)
        before += tl.sum(here)
    tl.store(totals + e, before)


@triton.jit(do_not_specialize=["n_slots", "top_k", "start", "E", "n_blocks"])
def place_kernel(
    indices, mask, counts, totals, slots, tokens, inverse, offsets, n_slots, top_k, start, E, n_blocks,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """slots[row] = slot, tokens[row] = slot // top_k, inverse[slot] = row (-1 where dropped), offsets: first rows."""
    b = tl.program_id(0)
    slot = b * BLOCK + tl.arange(0, BLOCK)
    expert = load_experts(indices, mask, slot, n_slots, top_k, start, E, MASKED)
    row = tl.zeros([BLOCK], tl.int32)
    before = tl.zeros([], tl.int32)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        total = tl.load(totals + e, mask=e < E, other=0)
        ends = before + tl.cumsum(total)
        base = ends - total + tl.load(counts + e.to(tl.int64) * n_blocks + b, mask=e < E, other=0)
        hits = (expert[:, None] == e[None, :]).to(tl.int32)
        row += tl.sum(hits * (base[None, :] + tl.cumsum(hits, 0) - hits), 1)
        if b == 0:
            tl.store(offsets + 1 + e, ends, mask=e < E)
        before += tl.sum(total)
    if b == 0:
        tl.store(offsets, 0)
    found = expert >= 0
    tl.store(inverse + slot, tl.where(found, row, -1), mask=slot < n_slots)
    tl.store(slots + row, slot, mask=found)
    tl.store(tokens + row, slot // top_k, mask=found)


@triton.jit(do_not_specialize=["E"])
def tiles_kernel(offsets, tiles, n_tiles, E, BM: tl.constexpr, BE: tl.constexpr):
    """tiles[i] = (expert, first row) of every run of up to BM rows of one expert, in order; n_tiles of them."""
    e = tl.program_id(0)
    before = tl.zeros([], tl.int32)
    for first in range(0, e, BE):
        other = first + tl.arange(0, BE)
        ends = tl.load(offsets + other + 1, mask=other < e, other=0)
        before += tl.sum(tl.cdiv(ends - tl.load(offsets + other, mask=other < e, other=0), BM))
    start = tl.load(offsets + e)
    count = tl.cdiv(tl.load(offsets + e + 1) - start, BM)
    for first in range(0, count, BE):
        i = first + tl.arange(0, BE)
        tl.store(tiles + 2 * (before + i), e, mask=i < count)
        tl.store(tiles + 2 * (before + i) + 1, start + i * BM, mask=i < count)
    if e == E - 1:
        tl.store(n_tiles, before + count)


BLOCK, SCAN = 256, 256  # slots that one program places; blocks that one step of a scan adds up


class Route(NamedTuple):
    """slots, tokens [N'] int32: the slot of each row, and its token. inverse [T K] int32: the row of each slot, or -1.

    offsets [E + 1] int32: where experts begin. N' = T K is the host's bound on the number of rows, offsets[E] the true
    number, which only the device knows.
    """

    slots: Tensor
    tokens: Tensor
    inverse: Tensor
    offsets: Tensor
    top_k: int

    @property
    def n_experts(self) -> int:
        return self.offsets.shape[0] - 1

    def tiles(self, size: int) -> tuple[Tensor, Tensor]:
        """(tiles [bound, 2], how many): every run of up to `size` rows of one expert, as (expert, first row)."""
        E = self.n_experts
        tiles = self.offsets.new_empty(triton.cdiv(len(self.slots), size) + E, 2)
        n_tiles = self.offsets.new_empty(1)
        run(tiles_kernel, (E,), self.offsets, tiles, n_tiles, E, BM=size, BE=64)
        return tiles, n_tiles


def make_route(indices: Tensor, mask: Tensor | None, n_experts: int, start: int = 0) -> Route:
    """Slots sorted by expert without waiting for the device; see `reference.route`. Raises ValueError as `check`."""
    given = {"indices": (indices, "T K", INTEGERS)}
    check("make_route", given if mask is None else given | {"mask": (mask, "T", BOOL)})
    check_index("make_route", "n_experts", n_experts, 1, "how many experts are here")
    check_index("make_route", "start", start, 0, "the id of the first of them")
    check_runs(indices=indices, mask=mask)
    indices = indices.contiguous()
    n_slots, top_k = indices.numel(), max(indices.shape[1], 1)
    n_blocks = triton.cdiv(n_slots, BLOCK)
    slots, tokens, inverse, offsets = (
        indices.new_empty(n, dtype=torch.int32) for n in (n_slots, n_slots, n_slots, n_experts + 1)
    )
    if n_slots == 0:
        return Route(slots, tokens, inverse, offsets.zero_(), top_k)
    counts = offsets.new_empty(n_experts, n_blocks)
    totals = offsets.new_empty(n_experts)
    masked = mask is not None
    seen = mask.contiguous().view(torch.uint8) if mask is not None else indices
    sizes = (n_slots, top_k, start, n_experts, n_blocks)
    kinds = dict(MASKED=masked, BLOCK=BLOCK, BE=min(16, triton.next_power_of_2(n_experts)))
    run(count_kernel, (n_blocks,), indices, seen, counts, *sizes, **kinds)
    run(scan_kernel, (n_experts,), counts, totals, n_blocks, BLOCK=SCAN)
    run(place_kernel, (n_blocks,), indices, seen, counts, totals, slots, tokens, inverse, offsets, *sizes, **kinds)
    return Route(slots, tokens, inverse, offsets, top_k)


def sorted_route(x: Tensor, offsets: Tensor) -> Route:
    """The routing of rows that stand where they belong: row n is slot n of token n. Ends rise from 0 to len(x)."""
    slots = torch.arange(len(x), dtype=torch.int32, device=x.device)
    ends = offsets.clamp(0, len(x)).cummax(0).values
    return Route(slots, slots, slots, F.pad(ends.int(), (1, 0)), 1)
