"""Atomic axes: split every composite dimension, and both tensors of a rule are views over the same axes.

A `Group` is all tensors that one rule relates at one value of its shared captures. Each pair (source, target) in it
takes one range of every axis, and is one strided copy. Splitting a dimension is always a view; only merging may copy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fmoe.layout.names import Value, patterns
from fmoe.layout.notation import Address, Rule
from fmoe.types import TensorSpec

Dims = tuple[tuple[str, ...], ...]
Coords = tuple[int, ...]


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

    def dims(self, side: Address) -> Dims:
        """The side's dimensions as tuples of axes; an explicit 1 is a dimension of no axis."""
        return tuple(tuple(self.rule.ragged.get(a, a) for a in dim if a != "1") for dim in side.axes or ())

    def asked(self, axis: str) -> range:
        return self.window.get(axis, range(self.sizes[axis]))

    @cached_property
    def storage(self) -> tuple[int, ...]:
        """The target's dimensions as its storage orders them: stacked ones outermost, then as the source has them."""
        at = {axis: i for i, axis in enumerate(flat(self.dims(self.rule.source)))}
        first = [min((at[a] for a in dim if a in at), default=-1) for dim in self.dims(self.rule.target)]
        return tuple(sorted(range(len(first)), key=lambda i: (first[i], i)))

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """The axes that source names count, in the order of the target's storage."""
        dims = self.dims(self.rule.target)
        return tuple(a for i in self.storage for a in dims[i] if a in self.rule.stacked)

    def grid(self, names: tuple[str, ...]) -> Iterator[Coords]:
        return product(*(range(len(self.parts[n])) if n in self.parts else self.asked(n) for n in names))

    @cached_property
    def sources(self) -> list[str]:
        order = [self.stacked.index(n) for n in self.rule.stacked]
        return [self.found[tuple([at[i] for i in order])] for at in self.grid(self.stacked)]

    @cached_property
    def targets(self) -> list[str]:
        pattern, axes = patterns(self.rule)[1], self.rule.unstacked
        return [pattern.render(self.shared | dict(zip(axes, c, strict=True))) for c in self.grid(axes)]

    @cached_property
    def permutation(self) -> list[int] | None:
        """The target's dimensions as places in the source, where whole dimensions are all that moves; else None."""
        source, target = self.dims(self.rule.source), self.dims(self.rule.target)
        whole = all(a in self.local or len(self.asked(a)) == n for a, n in self.sizes.items())
        if self.rule.stacked or self.rule.unstacked or not whole or len(set(source)) < len(source):
            return None
        return [source.index(dim) for dim in target] if set(source) == set(target) else None

    def taken(self, at: Mapping[str, int]) -> dict[str, range]:
        """The range of every axis that a pair takes, given its captured coordinates."""
        point = {n: self.parts[n][c] if n in self.parts else range(c, c + 1) for n, c in at.items()}
        return {n: self.asked(n) for n in self.sizes if n not in at} | point

    def held(self, side: Address, at: Mapping[str, int]) -> dict[str, range]:
        """The range of every axis that a tensor holds: all, unless it is a window or a part itself."""
        here, axes = side is self.rule.source, flat(self.dims(side))
        held = {a: range(self.sizes[a]) if here and a not in self.local else self.asked(a) for a in axes}
        return held | {a: self.parts[a][at[a]] for a in axes if a in side.captures}

    def shape(self, side: Address, at: Mapping[str, int]) -> tuple[int, ...]:
        held = self.held(side, at)
        return tuple(prod(len(held[a]) for a in dim) for dim in self.dims(side))

    def target_specs(self) -> dict[str, TensorSpec]:
        """The abstract result: every target's name, shape and dtype."""
        names = self.rule.unstacked
        if not any(n in self.parts for n in names):
            return dict.fromkeys(self.targets, TensorSpec(self.shape(self.rule.target, {}), self.dtype))
        shapes = (self.shape(self.rule.target, dict(zip(names, c, strict=True))) for c in self.grid(names))
        return {t: TensorSpec(shape, self.dtype) for t, shape in zip(self.targets, shapes, strict=True)}

    def copies(self) -> Iterator[Copy]:
        """One strided copy for each pair of a source and a target."""
        for s, here in zip(self.sources, self.grid(self.stacked), strict=True):
            for t, there in zip(self.targets, self.grid(self.rule.unstacked), strict=True):
                at = dict(zip(self.stacked + self.rule.unstacked, here + there, strict=True))
                yield Copy(s, t, *self._boxes(at), self.dtype)

    def _boxes(self, at: Mapping[str, int]) -> tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]]:
        taken = self.taken(at)
        (start, step), (target_start, target_step) = (
            self._box(side, at) for side in (self.rule.source, self.rule.target)
        )
        loop = [a for a in step if a in target_step]
        shape = tuple(len(taken[a]) for a in loop)
        return shape, start, tuple(step[a] for a in loop), target_start, tuple(target_step[a] for a in loop)

    def _box(self, side: Address, at: Mapping[str, int]) -> tuple[int, dict[str, int]]:
        """Where the pair's box begins in this side's tensor, and the stride of each axis there."""
        held, taken, step, size = self.held(side, at), self.taken(at), {}, 1
        for axis in reversed(flat(self.dims(side))):
            step[axis] = size
            size *= len(held[axis])
        start = sum(step[a] * (taken[a].start - held[a].start) for a in step)
        return start, dict(reversed(step.items()))


def flat(dims: Dims) -> list[str]:
    return [axis for dim in dims for axis in dim]


class NotAView(Exception):
    """A tensor that only a copy can make: it merges axes that do not lie side by side, or stacks several tensors."""


def convert(group: Group, params: Mapping[str, Tensor], *, views: bool = False) -> dict[str, Tensor]:
    """The targets of a group: views where strides allow, else copies, laid out in storage as the sources are.

    views: raise NotAView instead of copying.
    """
    if not group.sources:  # an empty window of what names count
        device = next((t.device for t in params.values()), None)
        specs = group.target_specs().items()
        return {n: torch.empty(spec.shape, dtype=spec.dtype, device=device) for n, spec in specs}
    if group.permutation is not None:
        return {group.targets[0]: _permuted(params[group.sources[0]], group.permutation)}
    axes = [a for a in flat(group.dims(group.rule.source)) if a not in group.rule.unstacked or a in group.parts]
    spread = [
        _pieces(group, params[name], dict(zip(group.stacked, at, strict=True)))
        for name, at in zip(group.sources, group.grid(group.stacked), strict=True)
    ]
    if group.rule.stacked and views:
        raise NotAView
    if group.rule.stacked:
        made = [_stack(group, pieces, axes) for pieces in zip(*spread, strict=True)]
    else:
        made = [_arrange(group, piece, axes, views) for piece in spread[0]]
    return dict(zip(group.targets, made, strict=True))


def _pieces(group: Group, tensor: Tensor, at: Mapping[str, int]) -> list[Tensor]:
    """The part of a source that each target takes: a view over the axes common to both."""
    source, axes = group.rule.source, flat(group.dims(group.rule.source))
    held = group.held(source, at)
    if len(axes) != tensor.ndim or any(len(dim) != 1 for dim in group.dims(source)):
        tensor = tensor.reshape([len(held[a]) for a in axes])
    for i, axis in enumerate(axes):
        if axis not in group.rule.unstacked and len(asked := group.asked(axis)) < len(held[axis]):
            tensor = tensor.narrow(i, asked.start, len(asked))
    pieces = [tensor]
    for axis in group.rule.unstacked:
        i = axes.index(axis)
        if axis in group.parts:
            pieces = [p.narrow(i, r.start, len(r)) for p in pieces for r in group.parts[axis]]
        else:
            inside = slice(group.asked(axis).start - held[axis].start, group.asked(axis).stop - held[axis].start)
            pieces = [q for p in pieces for q in p.unbind(i)[inside]]
            axes.remove(axis)
    return pieces


def _arrange(group: Group, piece: Tensor, axes: list[str], views: bool) -> Tensor:
    """A piece over common axes, as the target's dimensions: permuted, then merged."""
    dims = group.dims(group.rule.target)
    order = [axes.index(a) for i in group.storage for a in dims[i]]
    piece = _permuted(piece, order)
    if any(len(dim) != 1 for dim in dims):
        size = dict(zip([axes[i] for i in order], piece.shape, strict=True))
        shape = [prod(size[a] for a in dims[i]) for i in group.storage]
        try:
            piece = piece.view(shape) if views else piece.reshape(shape)
        except RuntimeError:
            raise NotAView from None
    return _permuted(piece, _inverse(group.storage))


def _stack(group: Group, pieces: tuple[Tensor, ...], axes: list[str]) -> Tensor:
    """A target of several sources: one `torch.stack` where they lie in storage one after the other."""
    dims = group.dims(group.rule.target)
    order = [a for i in group.storage for a in dims[i]]
    if order == [*group.stacked, *axes] and not set(group.stacked) & set(group.parts):
        whole = torch.stack(pieces)
    else:
        sizes = group.held(group.rule.target, {})
        whole = pieces[0].new_empty([len(sizes[a]) for a in order])
        for at, piece in zip(group.grid(group.stacked), pieces, strict=True):
            taken, box = group.taken(dict(zip(group.stacked, at, strict=True))), whole
            for i, axis in enumerate(order):
                if axis in group.stacked:
                    box = box.narrow(i, taken[axis].start - sizes[axis].start, len(taken[axis]))
            box.copy_(piece.permute([axes.index(a) for a in order if a in axes]).reshape(box.shape))
    sizes = group.held(group.rule.target, {})
    shape = [prod(len(sizes[a]) for a in dims[i]) for i in group.storage]
    return _permuted(whole.reshape(shape), _inverse(group.storage))


def _permuted(tensor: Tensor, order: Sequence[int]) -> Tensor:
    return tensor if list(order) == sorted(order) else tensor.permute(*order)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
