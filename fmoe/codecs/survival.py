"""How much of a change to decoded weights survives when they are written in codes again.

What was decoded lies on the grid of its scales, and comes back exactly. A merge moves it off; where it moves less than
half a step, the nearest code is the one that it had, and the change is gone.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmoe.codecs.parts import Parts
from fmoe.layout.adapter import Adapter
from fmoe.types import AdapterError, Problem

LEAST = 0.05
"""Below this share of the changed numbers that reach another code, an export is refused."""


class Survival(NamedTuple):
    """Of one tensor, the numbers that lie off the grid that they were decoded from.

    changed: how many. far: how far from a code they lie, in steps, and fresh: how many a fresh scale brings to another;
    error, size: squares of what is written less what should be, and of the latter. All are sums, so that those of a
    tensor's parts add up.
    """

    name: str
    changed: int = 0
    far: float = 0.0
    fresh: float = 0.0
    error: float = 0.0
    size: float = 0.0

    @property
    def moved(self) -> float:
        """The share that reaches another code, estimated from how far from one they lie."""
        return max(self.fresh / self.changed, _reaching(self.far / self.changed))


def telling(adapter: Adapter, survived: Callable[[Survival], None] | None) -> Adapter:
    """The adapter, whose codecs say of every tensor that has changed since it was decoded how much survives."""
    tell: Callable[[Any], Any] = lambda stage: replace(stage, told=survived) if hasattr(stage, "told") else stage
    return replace(adapter, stages=tuple(map(tell, adapter.stages)))


@torch.no_grad()
def survival(p: Parts, weight: Tensor, scale: Tensor, made: Mapping[str, Tensor], used: Tensor) -> Survival | None:
    """Of a weight that was decoded with a scale, and is written as these codes under `used`; None if it is as it was.

    Changes much smaller than a step leave numbers near their codes; larger ones leave them anywhere, a quarter of a
    step away on average. So the mean distance says how many moved.
    """
    if weight.is_meta:
        return None
    found = Survival(p.name)
    for w, a, before, step in _under_zeros(p, weight, made) if p.format.zeros else _anew(p, weight, made, scale, used):
        off = (w != before) & ~(w.isnan() & before.isnan())
        if not bool(off.any()):
            continue
        w, b, a, step = (t[off].double() for t in (w, before, a, step))
        far = float(((w - b).abs() / step).nan_to_num(nan=0.5).clamp(max=0.5).sum())
        fresh = float((a - b).abs().gt(step / 16).sum())
        error, size = float((a - w).square().sum()), float(w.square().sum())
        found = _sum(found, Survival(p.name, w.numel(), far, fresh, error, size))
    return found if found.changed else None


def _sum(a: Survival, b: Survival) -> Survival:
    error, size = a.error + b.error, a.size + b.size
    return Survival(a.name, a.changed + b.changed, a.far + b.far, a.fresh + b.fresh, error, size)


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


def _reaching(far: float) -> float:
    """The share of normal changes that reach another code, where they lie this far from one on average, in steps."""
    if far >= 0.22:
        return 1.0
    deviation = far * (math.pi / 2) ** 0.5
    return math.erfc(0.5 / (deviation * 2**0.5)) if deviation else 0.0


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
    for part in sorted(parts):
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
    return (f"{text}: about {moved:.1%} of their {changed:,} changed numbers reach another code, {error:.2%} off",)
