"""Atomic axes: split every composite dimension, and both tensors of a rule are views over the same axes.

A `Group` is all tensors that one rule relates at one value of its shared captures. Each pair (source, target) in it
takes one range of every axis, and is one strided copy. Splitting a dimension is always a view; only merging may copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import torch

from fmoe.layout.names import patterns
from fmoe.layout.notation import Rule
from fmoe.layout.templates import Value
from fmoe.types import TensorSpec

Dims = tuple[tuple[str, ...], ...]
Coords = tuple[int, ...]
Side = Literal["source", "target"]


class Copy(NamedTuple):
    """target[target_offset + i . target_strides] = source[source_offset + i . source_strides] for every i < shape.

    Offsets and strides count elements of contiguous tensors of the planned shapes.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    source_offset: int
    source_strides: tuple[int, ...]
    target_offset: int
    target_strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """One rule at one value of its shared captures.

    sizes: each axis, in full. found: the name at each coordinate of `rule.stacked`. parts: where each choice of a
    ragged axis lies in it. window: the range of an axis that is asked for, if not all. local: the axes of which the
    sources hold that range only.
    """

    rule: Rule
    shared: dict[str, Value]
    sizes: dict[str, int]
    dtype: torch.dtype
    found: Mapping[tuple[Value, ...], str]
    parts: dict[str, tuple[range, ...]] = field(default_factory=dict)
    window: Mapping[str, range] = field(default_factory=dict)
    local: frozenset[str] = frozenset()

    def dims(self, side: Side) -> Dims:
        """The side's dimensions, as the rule has them."""
        return self.rule.dims[side == "target"]

    def asked(self, axis: str) -> range:
        return self.window.get(axis, range(self.sizes[axis]))

    @cached_property
    def storage(self) -> tuple[int, ...]:
        """The target's dimensions as its storage orders them: stacked ones outermost, then as the source has them."""
        at = {axis: i for i, axis in enumerate(flat(self.dims("source")))}
        first = [min((at[a] for a in dim if a in at), default=-1) for dim in self.dims("target")]
        return tuple(sorted(range(len(first)), key=lambda i: (first[i], i)))

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """The axes that source names count, in the order of the target's storage."""
        dims = self.dims("target")
        return tuple(a for i in self.storage for a in dims[i] if a in self.rule.stacked)

    def grid(self, names: tuple[str, ...]) -> Iterator[Coords]:
        return product(*map(self._counted, names))

    def _counted(self, axis: str) -> range:
        """What names count of an axis: its parts, or its entries."""
        return range(len(self.parts[axis])) if axis in self.parts else self.asked(axis)

    @cached_property
    def sources(self) -> list[str]:
        order = [self.stacked.index(n) for n in self.rule.stacked]
        return [self.found[tuple([at[i] for i in order])] for at in self.grid(self.stacked)]

    @cached_property
    def targets(self) -> list[str]:
        return patterns(self.rule)[1].renders(self.shared, {n: self._counted(n) for n in self.rule.unstacked})

    @cached_property
    def permutation(self) -> list[int] | None:
        """The target's dimensions as places in the source, where whole dimensions are all that moves; else None."""
        source, target = self.dims("source"), self.dims("target")
        whole = all(a in self.local or len(self.asked(a)) == n for a, n in self.sizes.items())
        if self.rule.stacked or self.rule.unstacked or not whole or len(set(source)) < len(source):
            return None
        return [source.index(dim) for dim in target] if set(source) == set(target) else None

    def taken(self, at: Mapping[str, int]) -> dict[str, range]:
        """The range of every axis that a pair takes, given its captured coordinates."""
        point = {n: self.parts[n][c] if n in self.parts else range(c, c + 1) for n, c in at.items()}
        return {n: self.asked(n) for n in self.sizes if n not in at} | point

    def held(self, side: Side, at: Mapping[str, int]) -> dict[str, range]:
        """The range of every axis that a tensor holds: all, unless it is a window or a part itself."""
        here, axes = side == "source", flat(self.dims(side))
        captures = (self.rule.source if here else self.rule.target).captures
        held = {a: range(self.sizes[a]) if here and a not in self.local else self.asked(a) for a in axes}
        return held | {a: self.parts[a][at[a]] for a in axes if a in captures}

    def shape(self, side: Side, at: Mapping[str, int]) -> tuple[int, ...]:
        held = self.held(side, at)
        return tuple(prod(len(held[a]) for a in dim) for dim in self.dims(side))

    def target_specs(self) -> dict[str, TensorSpec]:
        """The abstract result: every target's name, shape and dtype."""
        names = self.rule.unstacked
        if not any(n in self.parts for n in names):
            return dict.fromkeys(self.targets, TensorSpec(self.shape("target", {}), self.dtype))
        shapes = (self.shape("target", dict(zip(names, c, strict=True))) for c in self.grid(names))
        return {t: TensorSpec(shape, self.dtype) for t, shape in zip(self.targets, shapes, strict=True)}

    def copies(self) -> Iterator[Copy]:
        """One strided copy for each pair of a source and a target."""
        for s, here in zip(self.sources, self.grid(self.stacked), strict=True):
            for t, there in zip(self.targets, self.grid(self.rule.unstacked), strict=True):
                at = dict(zip(self.stacked + self.rule.unstacked, here + there, strict=True))
                yield Copy(s, t, *self._boxes(at), self.dtype)

    def _boxes(self, at: Mapping[str, int]) -> tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]]:
        taken = self.taken(at)
        (start, step), (target_start, target_step) = self._box("source", at), self._box("target", at)
        loop = [a for a in step if a in target_step]
        shape = tuple(len(taken[a]) for a in loop)
        return shape, start, tuple(step[a] for a in loop), target_start, tuple(target_step[a] for a in loop)

    def _box(self, side: Side, at: Mapping[str, int]) -> tuple[int, dict[str, int]]:
        """Where the pair's box begins in this side's tensor, and the stride of each axis there."""
        held, taken, step, size = self.held(side, at), self.taken(at), {}, 1
        for axis in reversed(flat(self.dims(side))):
            step[axis] = size
            size *= len(held[axis])
        start = sum(step[a] * (taken[a].start - held[a].start) for a in step)
        return start, dict(reversed(step.items()))


def flat(dims: Dims) -> list[str]:
    return [axis for dim in dims for axis in dim]
