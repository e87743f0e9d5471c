"""A plan of several stages as what moves: strided copies from source tensors to targets, and the values that change.

Two tables in a row are one: a copy A -> N after a copy N -> B is a copy A -> B, wherever both cut N along the same
digits of its index. So renaming after stacking, or one layout to another through the native one, costs one pass.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from fmoe.codecs import Change, Changed, CodecPlan
from fmoe.layout.axes import Copy
from fmoe.layout.beside import BesidePlan
from fmoe.layout.grouping import Specs
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.types import TensorSpec

SLICE = 8 * 2**20  # bytes of the largest tensor that is changed at once, where parts of it can be


class Step(NamedTuple):
    """made = change(inputs); each input is gathered by its copies. parts: the steps of the same tensors."""

    specs: dict[str, TensorSpec]
    gather: dict[str, tuple[Copy, ...]]
    change: Change
    parts: range = range(0)


class Moved(NamedTuple):
    """A copy into a target, from a source tensor, or from what a step made (its number)."""

    copy: Copy
    step: int | None


@dataclass(frozen=True)
class Flow:
    """moves: in the order of the targets. units: (sources, targets) that only `Plan.run` can make."""

    moves: tuple[Moved, ...]
    steps: tuple[Step, ...]
    units: tuple[tuple[list[str], list[str]], ...]


class _Whole(NamedTuple):
    """A name that is, as it is, a source tensor or something made."""

    name: str
    step: int | None
    spec: TensorSpec


_Origin = _Whole | tuple[Moved, ...] | None  # None: not to be told as copies


def flow(plan: Plan, pieces: Mapping[str, tuple[Copy, ...]] = {}) -> Flow:
    """What moves where. Everything comes out of it once: as moves, or in a unit. pieces: of a source in chunks."""
    steps: list[Step] = []
    live: dict[str, _Origin] = {n: _Whole(n, None, spec) for n, spec in plan.specs.items()}
    live = _through(plan, live | {n: tuple(Moved(c, None) for c in cs) for n, cs in pieces.items()}, steps)
    moves = [m for n in plan.targets if (origin := live[n]) is not None for m in _moves(origin, n)]
    opaque = {n for n in plan.targets if live[n] is None}
    units = ((s, [n for n in t if n in opaque]) for s, t in plan.units()) if opaque else ()
    used = {m.step for m in moves}
    kept = [step if i in used else Step({}, {}, step.change) for i, step in enumerate(steps)]
    return Flow(tuple(moves), tuple(kept), tuple((s, t) for s, t in units if t))


def _through(plan: Plan, live: dict[str, _Origin], steps: list[Step]) -> dict[str, _Origin]:
    specs = plan.specs
    for stage in plan.stages:
        if isinstance(stage, TablePlan):
            live = _moved(stage, live)
        elif isinstance(stage, CodecPlan):
            live = _changed(stage, specs, live, steps)
        elif isinstance(stage, BesidePlan):
            sides = (_through(p, {n: live[n] for n in p.specs}, steps) for p in stage.plans)
            live = {name: origin for side in sides for name, origin in side.items()}
        else:
            live = dict.fromkeys(stage.targets)
        specs = stage.targets
    return live


def _moved(stage: TablePlan, live: Mapping[str, _Origin]) -> dict[str, _Origin]:
    out: dict[str, _Origin] = {}
    for group in stage.groups:
        found: dict[str, list[Moved] | None] = {t: [] for t in group.targets}
        for copy in group.copies():
            made = found[copy.target]
            more = _after(live.get(copy.source), copy)
            found[copy.target] = None if made is None or more is None else made + more
        out |= {t: None if moves is None else tuple(moves) for t, moves in found.items()}
    out |= {t: live.get(s) for s, t in stage.pairs.items()}
    aliased = {n for alias in stage.aliases for n in (alias.of, alias.name)}  # compared, or made from another tensor
    for sources, targets in stage.units() if aliased else ():
        if not aliased.isdisjoint((*sources, *targets)):
            out |= dict.fromkeys(targets)
    return out


def _changed(stage: CodecPlan, specs: Specs, live: Mapping[str, _Origin], steps: list[Step]) -> dict[str, _Origin]:
    out = {n: _renamed(live.get(stage.renamed.get(n, n)), n, stage) for n in stage.targets}
    for changed in stage.changes:
        origins = {n: live.get(n) for n in changed.sources}
        moves = {n: () if o is None else tuple(_moves(o, n)) for n, o in origins.items()}
        plain = all(o is not None for o in origins.values()) and all(
            m.step is None for ms in moves.values() for m in ms
        )
        out |= dict.fromkeys(changed.targets)
        if plain:
            copies = {n: tuple(m.copy for m in ms) for n, ms in moves.items()}
            try:
                out |= _sliced(stage, changed, specs, copies, steps)
            except _Crossed:  # what comes in is no row of boxes: made of it whole, or by `Plan.run`
                if stage.part(changed) is None:
                    out |= _sliced(stage, changed._replace(rows={}), specs, copies, steps)
    return out


def _renamed(origin: _Origin, name: str, stage: CodecPlan) -> _Origin:
    """The same numbers under another name, and in another shape: they lie one after the other as they did."""
    return origin._replace(spec=stage.targets[name]) if isinstance(origin, _Whole) else origin


def _sliced(
    stage: CodecPlan, changed: Changed, specs: Specs, copies: Mapping[str, tuple[Copy, ...]], steps: list[Step]
) -> dict[str, _Origin]:
    """The targets of a change, made in parts along the first axis where it allows that: as many as memory asks for."""
    whole = {n: specs[n] for n in changed.sources} | {t: stage.targets[t] for t in changed.targets}
    rows, asked = changed.rows, stage.part(changed)
    counts = [-(-whole[n].shape[0] // rows[n]) for n in changed.sources if rows.get(n)]
    count = counts[0] if counts and asked is None else len(asked or ())
    some = max(1, count * SLICE // max(1, *(spec.nbytes for spec in whole.values()))) if counts else 1
    starts = range(0, count, some) if counts else range(1)
    parts, made = [], {t: list[Moved]() for t in changed.targets}
    these = range(len(steps), len(steps) + len(starts))
    for start in starts:
        end, at = min(start + some, count) if counts else 0, asked.start if asked else 0
        taken = {n: _rows(specs[n], rows.get(n, 0), start + at, end + at) for n in changed.sources}
        inside = {n: [_within(c, specs[n], *taken[n]) for c in cs] for n, cs in copies.items()}
        given = {n: _some(specs[n], *taken[n]) for n in changed.sources}
        parts.append(Step(given, {n: tuple(c for c in cs if c) for n, cs in inside.items()}, changed.change, these))
        for t in changed.targets:
            first, last = _rows(whole[t], rows.get(t, 0), start, end)
            size = _some(whole[t], first, last).numel
            at = first * prod(whole[t].shape[1:])
            made[t].append(Moved(Copy(t, t, (size,), 0, (1,), at, (1,), whole[t].dtype), len(steps) + len(parts) - 1))
    steps += parts
    if len(parts) == 1:
        return {t: _Whole(t, len(steps) - 1, whole[t]) for t in changed.targets}
    once = lambda t: made[t] if rows.get(t) else made[t][:1]  # what every part makes, or passes on, alike
    return {t: tuple(once(t)) for t in changed.targets}


def _rows(spec: TensorSpec, rows: int, start: int, end: int) -> tuple[int, int]:
    """The entries of the first axis of some units; all of what is in no units."""
    n = spec.shape[0] if spec.shape else 1
    return (min(start * rows, n), min(end * rows, n)) if rows else (0, n)


def _some(spec: TensorSpec, first: int, last: int) -> TensorSpec:
    return TensorSpec((last - first, *spec.shape[1:]), spec.dtype) if spec.shape else spec


def _within(copy: Copy, spec: TensorSpec, first: int, last: int) -> Copy | None:
    """The part of a copy that ends in some entries of its target's first axis, as one into these alone."""
    if not spec.shape or (first, last) == (0, spec.shape[0]):
        return copy
    inner = prod(spec.shape[1:])
    shape, strides = (last - first, inner), (inner, 1)
    return compose(copy, Copy(copy.target, copy.target, shape, first * inner, strides, 0, strides, copy.dtype))


def _moves(origin: "_Whole | tuple[Moved, ...]", target: str) -> Iterator[Moved]:
    if isinstance(origin, _Whole):
        size = (origin.spec.numel,)
        yield Moved(Copy(origin.name, target, size, 0, (1,), 0, (1,), origin.spec.dtype), origin.step)
    else:
        yield from (Moved(m.copy._replace(target=target), m.step) for m in origin)


def _after(origin: _Origin, copy: Copy) -> list[Moved] | None:
    """The moves of one target, made by a copy from something that has moved already."""
    if origin is None:
        return None
    if isinstance(origin, _Whole):
        return [Moved(copy._replace(source=origin.name), origin.step)]
    try:
        pairs = ((compose(m.copy, copy), m.step) for m in origin)
        return [Moved(made, step) for made, step in pairs if made is not None]
    except _Crossed:
        return None


class _Crossed(Exception):
    """Two copies that cut the tensor between them along different digits."""


def compose(a: Copy, b: Copy) -> Copy | None:
    """The part of A -> N -> B that goes through both copies, as a copy A -> B; None where they do not meet.

    An index into N is written in digits whose places are all strides that either copy takes in N; each copy is then a
    box of digits, and so is what they share.
    """
    if 0 in a.shape or 0 in b.shape:
        return None
    places = {s for copy, strides in ((a, a.target_strides), (b, b.source_strides))
              for s, n in zip(strides, copy.shape, strict=True) if n > 1}  # fmt: skip
    order = sorted(places | {1}, reverse=True)
    left = _digits(a.target_offset, a.shape, a.target_strides, a.source_strides, order)
    right = _digits(b.source_offset, b.shape, b.source_strides, b.target_strides, order)
    start, end, shape, near, far = a.source_offset, b.target_offset, [], [], []
    for (i, n, step), (j, m, leap) in zip(left, right, strict=True):
        first, last = max(i, j), min(i + n, j + m)
        if first >= last:
            return None
        start += (first - i) * step
        end += (first - j) * leap
        if last - first > 1:
            shape.append(last - first)
            near.append(step)
            far.append(leap)
    return Copy(a.source, b.target, tuple(shape), start, tuple(near), end, tuple(far), a.dtype)


def _digits(
    offset: int, shape: tuple[int, ...], here: tuple[int, ...], there: tuple[int, ...], order: list[int]
) -> list[tuple[int, int, int]]:
    """(first, how many, stride on the other side) of a box at every place; the places are strides, largest first."""
    boxes: dict[int, tuple[int, int]] = {}
    for n, stride, other in zip(shape, here, there, strict=True):
        if n == 1:
            continue
        inner = [p for p in order if stride <= p < stride * n][::-1]  # smallest first
        for p, above in zip(inner, [*inner[1:], stride * n], strict=True):
            if above % p or p % stride:
                raise _Crossed
            boxes[p] = (above // p, other * (p // stride))
    digits = []
    for k, place in enumerate(order):
        first, offset = divmod(offset, place)
        n, other = boxes.get(place, (1, 0))
        if k and first + n > order[k - 1] // place:
            raise _Crossed
        digits.append((first, n, other))
    return digits
