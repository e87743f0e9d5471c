"""Placements follow axes: what a cut of a rule's sources is to its targets.

A placement cuts a dimension, a dimension is made of axes, and an even cut of one falls on one axis: with sizes (a b c),
`Shard` cuts the first of them that is longer than one, `_StridedShard(sf)` the one that as many blocks stand before.
On the other side of the rule the same axis stands elsewhere, after P blocks of others: there the cut is `Shard` if P is
one, else a strided shard of P; and where names count the axis, a rank simply has the tensors of its own indices. Axes
that neither side parts count as one, so what moves as a whole may be cut in any way. Nothing here communicates, and
what cannot be said is refused alike on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from fmoe.layout.axes import Group
from fmoe.layout.notation import Rule, interned

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Cut(NamedTuple):
    """A mesh dim of n ranks, this one the i-th, takes the i-th n-th of each of `blocks` equal parts."""

    n: int
    blocks: int
    i: int


def indices(size: int, cuts: Sequence[Cut]) -> Sequence[int]:
    """Which of range(size) one rank holds after those cuts in turn, as DTensor cuts it: in ceil-chunks.

    >>> indices(8, [Cut(2, 2, 0)]), indices(8, [Cut(2, 2, 0), Cut(2, 1, 1)]), indices(5, [Cut(4, 1, 2)])
    ([0, 1, 4, 5], [4, 5], range(4, 5))
    """
    held: Sequence[int] = range(size)
    for n, blocks, i in cuts:
        parts = [_chunk(part, n, i) for part in (_chunk(held, blocks, k) for k in range(blocks))]
        held = parts[0] if blocks == 1 else [x for part in parts for x in part]
    return held


def _chunk(held: Sequence[int], n: int, i: int) -> Sequence[int]:
    size = -(-len(held) // n)
    return held[i * size : (i + 1) * size]


def indices_of(tensor: DTensor) -> list[Sequence[int]]:
    """For each dimension, the indices that this rank's part of a tensor holds."""
    cuts = cuts_of(tensor)
    return [indices(n, [cut for d, cut in cuts if cut is not None and d == i]) for i, n in enumerate(tensor.shape)]


def cuts_of(tensor: DTensor) -> list[tuple[int | None, Cut | None]]:
    """For each mesh dim, the dimension that it cuts and how; (None, None) for what cuts nothing.

    Raises TypeError for a placement of a kind that is not known, ValueError for a process outside the mesh.
    """
    mesh, found = tensor.device_mesh, list[tuple[int | None, Cut | None]]()
    if (here := mesh.get_coordinate()) is None:
        raise ValueError(f"this process is not in {mesh}")
    for m, placement in enumerate(tensor.placements):
        if placement.is_replicate() or placement.is_partial():
            found.append((None, None))
            continue
        blocks = getattr(placement, "split_factor", 1)
        if not hasattr(placement, "dim") or not (placement.is_shard() or hasattr(placement, "split_factor")):
            raise TypeError(f"{placement} on {mesh}, expected Shard, Replicate or Partial")
        found.append((placement.dim % tensor.ndim, Cut(mesh.size(m), blocks, here[m])))
    return found


def follow(group: Group, tensor: DTensor) -> tuple[Group, list[Any]]:
    """The group as this rank holds it, and the targets' placement on each mesh dim: None where names take its place.

    Raises ValueError where a cut falls on no axis, or on one that the targets have where no placement reaches.
    """
    from torch.distributed.tensor import Replicate, Shard

    source, target = group.dims("source"), group.dims("target")
    here = {a: len(r) for a, r in group.held("source", dict.fromkeys(group.rule.stacked, 0)).items()}
    there = {a: len(group.asked(a)) for a in group.sizes}
    done: dict[str, list[Cut]] = {}
    into: dict[int, list[Cut]] = {}
    made: list[Any] = []
    for placement, (dim, cut) in zip(tensor.placements, cuts_of(tensor), strict=True):
        if dim is None or cut is None or not source[dim]:
            if cut is not None and cut.n > 1:
                raise ValueError(f"{placement} cuts a dimension of size 1")
            made.append(placement if cut is None else Replicate())
            continue
        axis, inner = _axis(source[dim], here, cut)
        alone = len(source[dim]) == 1 and (axis in group.rule.unstacked or (axis,) in target)
        if axis in group.parts or len(group.asked(axis)) < group.sizes[axis]:
            raise ValueError(f"{placement} cuts {axis}, of which parts are taken")
        if not alone and inner.n > 1 and here[axis] % (inner.n * inner.blocks):
            raise ValueError(f"{placement} cuts {axis} = {here[axis]} unevenly, beside other axes")
        done.setdefault(axis, []).append(inner)
        if axis in group.rule.unstacked:
            made.append(None)
        else:
            at = next(i for i, axes in enumerate(target) if axis in axes)
            before = target[at][: target[at].index(axis)]
            blocks = inner.blocks * prod(there[a] for a in before)
            made.append(Shard(at) if blocks == 1 else _strided(at, blocks))
            into.setdefault(at, []).extend([] if alone or inner.n == 1 else [inner._replace(blocks=blocks)])
        if not alone:
            here[axis], there[axis] = here[axis] // inner.n, there[axis] // inner.n
    if odd := [at for at, cuts in into.items() if not gathers(cuts)]:
        raise ValueError(f"dim {odd[0]} would be cut as {made}, which torch gathers in another order")
    sizes, window = dict(group.sizes), dict(group.window)
    for axis, cuts in done.items():
        if axis in group.rule.unstacked:
            window[axis] = _run(group.sizes[axis], tuple(cuts), axis)
        else:
            sizes[axis] = len(indices(group.sizes[axis], cuts))
    named = {a for a in done if a in group.rule.unstacked}
    return replace(group, sizes=sizes, window=window, local=group.local | named), made


def gathers(cuts: Sequence[Cut]) -> bool:
    """Whether torch puts a dimension of these cuts together as they took it apart: of its strided shards, few in a row.

    One, after plain ones; or before plain ones, of as many blocks as these make (FSDP of what is cut already).
    """
    strided = [m for m, cut in enumerate(cuts) if cut.blocks > 1]
    if len(strided) > 1:
        return False
    after = cuts[strided[0] + 1 :] if strided else ()
    return not after or strided[0] == 0 and cuts[0].blocks == prod(cut.n for cut in after)


def _axis(axes: Sequence[str], sizes: Mapping[str, int], cut: Cut) -> tuple[str, Cut]:
    """The axis of a dimension that a cut of it falls on, and how it cuts that. Raises ValueError where it is none."""
    if len(axes) == 1:
        return axes[0], cut
    blocks = [prod(sizes[a] for a in axes[:j]) for j in range(len(axes))]
    j = max(j for j, n in enumerate(blocks) if n and cut.blocks % n == 0)
    inner = cut._replace(blocks=cut.blocks // blocks[j])
    if inner.n > 1 and sizes[axes[j]] % (inner.n * inner.blocks):
        shown = " ".join(f"{a}={sizes[a]}" for a in axes)
        raise ValueError(f"{cut.n} ranks cut ({shown}) across more than one axis, where they part")
    return axes[j], inner


@lru_cache(maxsize=4096)
def _run(size: int, cuts: tuple[Cut, ...], axis: str) -> range:
    """The indices of this rank, if they are consecutive on every rank."""
    for at in product(*(range(c.n) for c in cuts)) if any(c.blocks > 1 for c in cuts) else ():
        mine = indices(size, [c._replace(i=i) for c, i in zip(cuts, at, strict=True)])
        if mine and list(mine) != list(range(mine[0], mine[-1] + 1)):
            raise ValueError(f"a rank would have {axis} = {list(mine)}, expected consecutive ones")
    mine = indices(size, cuts)
    return range(mine[0], mine[-1] + 1) if mine else range(size, size)


def _strided(dim: int, blocks: int) -> Any:
    try:
        from torch.distributed.tensor.placement_types import _StridedShard
    except ImportError:  # torch means to give it up some day
        raise ValueError(f"each rank would have a part of {blocks} blocks, which this torch has no word for") from None
    return _StridedShard(dim, split_factor=blocks)


def fused(group: Group) -> Group:
    """The same group, with axes that stand side by side in both sides as one, under the name of the first."""
    source, target = group.dims("source"), group.dims("target")
    apart = {*group.rule.stacked, *group.rule.unstacked, *group.window, *group.parts}
    pairs = {p for dim in source for p in zip(dim, dim[1:], strict=False)}
    pairs &= {p for dim in target for p in zip(dim, dim[1:], strict=False)}
    head: dict[str, str] = {}
    for a, b in ((a, b) for dim in source for a, b in zip(dim, dim[1:], strict=False)):
        if (a, b) in pairs and not apart & {a, b}:
            head[b] = head.get(a, a)
    if not head:
        return group
    sizes = {a: n * prod(group.sizes[b] for b, h in head.items() if h == a) for a, n in group.sizes.items()}
    return replace(group, rule=_heads(group.rule, tuple(head)), sizes={a: n for a, n in sizes.items() if a not in head})


@lru_cache(maxsize=4096)
def _heads(rule: Rule, gone: tuple[str, ...]) -> Rule:
    left = lambda side: replace(side, axes=tuple(tuple(a for a in dim if a not in gone) for dim in side.axes or ()))
    return interned(left(rule.source), left(rule.target))
