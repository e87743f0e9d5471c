"""How much of a change to decoded weights survives when they are written in codes again.

What was decoded lies on the grid of its scales, and comes back exactly. A merge moves it off; where it moves less than
half a step, the nearest code is the one that it had, and the change is gone.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmoe.codecs.parts import Parts
from fmoe.layout.adapter import Adapter
from fmoe.types import AdapterError, Problem

LEAST = 0.05
"""Below this share of the changed numbers that reach another code, an export is refused."""


ANYWHERE = 0.24
"""From this distance on, in steps, numbers lie anywhere between codes, and no more is known of how far they went."""


class Survival(NamedTuple):
    """Of one tensor, the numbers that lie off the grid that they were decoded from.

    changed: how many. kinds: of those with steps of one octave its number, how many, and the sums of how far they lie
    from a code, in steps, and of these; fresh: how many a fresh scale brings to another; error, size: squares of what
    is written less what should be, and of the latter. All are sums, so that those of a tensor's parts add up.
    """

    name: str
    changed: int = 0
    kinds: Sequence[Sequence[float]] = ()
    fresh: float = 0.0
    error: float = 0.0
    size: float = 0.0

    @property
    def moved(self) -> float:
        """The share that reaches another code, at least."""
        return max(self.fresh, _reaching(self.kinds)) / self.changed


def telling(adapter: Adapter, survived: Callable[[Survival], None] | None) -> Adapter:
    """The adapter, whose codecs say of every tensor that has changed since it was decoded how much survives."""
    tell: Callable[[Any], Any] = lambda stage: replace(stage, told=survived) if hasattr(stage, "told") else stage
    return replace(adapter, stages=tuple(map(tell, adapter.stages)))


@torch.no_grad()
def survival(p: Parts, weight: Tensor, scale: Tensor, made: Mapping[str, Tensor], used: Tensor) -> Survival | None:
    """Of a weight that was decoded with a scale, and is written as these codes under `used`; None if it is as it was.

    Changes much smaller than a step leave numbers near their codes; larger ones leave them anywhere, a quarter of a
    step away on average. So the mean distance of numbers with steps alike says how many moved, or at least how many.
    """
    if weight.is_meta:
        return None
    found = Survival(p.name)
    for w, a, before, step in _under_zeros(p, weight, made) if p.format.zeros else _anew(p, weight, made, scale, used):
        off = (w != before) & ~(w.isnan() & before.isnan())
        if not bool(off.any()):
            continue
        w, b, a, step = (t[off].double() for t in (w, before, a, step))
        kinds = _kinds((w - b).abs(), step)
        fresh = float((a - b).abs().gt(step / 16).sum())
        error, size = float((a - w).square().sum()), float(w.square().sum())
        found = _sum(found, Survival(p.name, w.numel(), kinds, fresh, error, size))
    return found if found.changed else None


def _sum(a: Survival, b: Survival) -> Survival:
    both: dict[float, list[float]] = {}
    for octave, *sums in (*a.kinds, *b.kinds):
        both[octave] = [one + other for one, other in zip(both.get(octave, (0, 0.0, 0.0)), sums, strict=True)]
    kinds = tuple((octave, *sums) for octave, sums in sorted(both.items()))
    error, size = a.error + b.error, a.size + b.size
    return Survival(a.name, a.changed + b.changed, kinds, a.fresh + b.fresh, error, size)


Compared = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]
"""(weight, what is written, the nearest under the scale from before, the step there) of some matrices."""


def _anew(p: Parts, weight: Tensor, made: Mapping[str, Tensor], scale: Tensor, used: Tensor) -> Compared:
    after = p.format.decode(made[p.name], used, torch.float32)
    for w, a, s in _matrices(p, weight, after, scale):
        before, step = p.format.nearest(w, s)
        yield w, a, before, step


def _under_zeros(p: Parts, weight: Tensor, made: Mapping[str, Tensor]) -> Compared:
    """No scale changes there, so that what is written is the nearest."""
    assert p.second
    scale, zero, order = made[p.beside], made[p.second[1]], made.get(p.order or "")
    after = p.format.decode(made[p.name], scale, torch.float32, second=zero, order=order)
    columns = torch.arange(p.shape[1]) // (p.format.block[1] or p.shape[1]) if order is None else order.long().cpu()
    yield weight, after, after.to(weight.dtype), scale.float().abs()[:, columns.to(scale.device)]


def _kinds(off: Tensor, step: Tensor) -> tuple[tuple[float, ...], ...]:
    octaves = step.log2().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round()
    far = (off / step).nan_to_num(nan=0.5).clamp(max=0.5)
    masks = ((float(each), octaves == each) for each in octaves.unique())
    return tuple((each, int(mine.sum()), float(far[mine].sum()), float(step[mine].sum())) for each, mine in masks)


def _reaching(kinds: Iterable[Sequence[float]]) -> float:
    """How many of numbers that were changed by a normal deviation reach another code, at least, by their distances.

    Where steps are so small that numbers lie anywhere, the deviation is that of numbers with the next larger ones.
    """
    found, deviation = 0.0, 0.0
    for _, count, far, step in sorted(kinds, key=lambda kind: -kind[0]):
        wide, steps = step / count, _deviation(min(far / count, ANYWHERE))
        deviation = steps * wide if far / count < ANYWHERE else max(deviation, steps * wide)
        found += count * math.erfc(wide / (deviation * 8**0.5)) if deviation else 0.0
    return found


def _deviation(far: float) -> float:
    """The deviation, in steps, that leaves numbers this far from the nearest code on average.

    That distance is 1/4 - 2/pi^2 (exp(-2 pi^2 s^2) + exp(-18 pi^2 s^2) / 9 + ..), a folded normal's.
    """
    mean = lambda s: 0.25 - 2 / math.pi**2 * sum(math.exp(-2 * (math.pi * k * s) ** 2) / k**2 for k in range(1, 200, 2))
    low, high = 0.0, 1.0
    for _ in range(40):
        mid = (low + high) / 2
        low, high = (mid, high) if mean(mid) < far else (low, mid)
    return low


def _matrices(p: Parts, weight: Tensor, after: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Matrix by matrix, so that little memory is taken."""
    if weight.ndim == 2:
        yield weight, after, scale
        return
    for e in range(weight.shape[0]):
        yield weight[e : e + 1], after[e : e + 1], scale if p.format.rank == 0 else scale[e : e + 1]


def told(parts: list[Survival]) -> tuple[str, ...]:
    """What a report says of it. Raises AdapterError where less than `LEAST` of some tensor's changes survives.

    parts: of a tensor that was made in several, they are one.
    """
    whole: dict[str, Survival] = {}
    for part in sorted(parts, key=lambda s: (s.name, s.changed, s.error, s.size)):
        whole[part.name] = _sum(whole[part.name], part) if part.name in whole else part
    found = list(whole.values())
    lost = [s for s in found if s.moved < LEAST]
    if lost:
        worst = min(lost, key=lambda s: s.moved)
        text = f"{worst.name!r}: about {worst.moved:.1%} of its {worst.changed:,} changed numbers reach another code"
        how = f"expected at least {LEAST:.0%}: the change is smaller than the steps of the format, and would be lost"
        fix = "Fix: quantization=False in save, dtype= in convert, writes the weights as they are"
        raise AdapterError([Problem(f"{text} ({len(lost)} such tensors), {how}. {fix}", tuple(s.name for s in lost))])
    if not found:
        return ()
    changed = sum(s.changed for s in found)
    moved = sum(s.moved * s.changed for s in found) / changed
    error = (sum(s.error for s in found) / max(1e-300, sum(s.size for s in found))) ** 0.5
    text = f"{len(found)} tensors were changed since they were decoded, and are written in codes again"
    return (
        f"{text}: about {moved:.1%} or more of their {changed:,} changed numbers reach another code, {error:.2%} off",
    )
