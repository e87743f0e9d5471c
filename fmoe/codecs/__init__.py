"""Value formats. A codec is a stage that changes values: a pair of pure functions, and `lossless` is False.

encode(decode(q)) == q      for every q that the codec itself wrote, and for every q whose scales are carried along

`formats.py` is the table of formats, `values.py` and `blocks.py` their numbers there and back, `parts.py` the names of
their parts, `quantised.py` and `changes.py` the stage that decodes and encodes them, `scales.py` the rules that move
scales with their weights, `cast.py` the stage that casts, `foreign/` what only tools write, and what is not read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from fmoe.layout.plan import TablePlan
from fmoe.layout.sharded.shards import blockwise
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Problem, TensorSpec

Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Vanished(AdapterError):
    """Nothing is left of a tensor, or of the part of one that a change was given: the others may have something left.

    made: what the change makes all the same. most: the largest number that is gone.
    """

    made: Mapping[str, Tensor] = {}
    most = 0.0


class Changed(NamedTuple):
    """targets = change(sources).

    rows: how many entries of the first axis of each tensor belong together, where the change can be made of some of
    them alone (0: of no part of it). block: of DTensors, the first source's dimensions may be cut between so many
    entries, counted from the last; 0: not at all.
    """

    sources: list[str]
    targets: list[str]
    change: Change
    rows: Mapping[str, int] = {}
    block: tuple[int, ...] = ()


@dataclass(frozen=True)
class CodecPlan:
    """`changes`: the tensors that change; all others pass through, under the names that `renamed` gives them (target ->
    source), in the shape that `targets` says. ranges: the part of its first axis that is made of a target.
    notes: what a report says of the values.
    """

    targets: dict[str, TensorSpec]
    changes: tuple[Changed, ...]
    what: str
    narrowed: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, range] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def maker(self) -> dict[str, int]:
        """target -> the number of the change that makes it."""
        return {t: i for i, changed in enumerate(self.changes) for t in changed.targets}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: spec.shape for n, spec in self.targets.items()}

    def units(self) -> Iterator[tuple[list[str], list[str]]]:
        for changed in self.changes:
            yield changed.sources, changed.targets
        for name in self.targets:
            if name not in self.maker:
                yield [self.renamed.get(name, name)], [name]

    def part(self, changed: Changed) -> range | None:
        """The range of units that a change is asked for; None: all."""
        return next((self.ranges[t] for t in changed.targets if t in self.ranges), None)

    def run(
        self, params: Mapping[str, Tensor], only: Iterable[str] | None = None, *, views: bool = False
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in self.targets if only is None else only:
            at = self.maker.get(name)
            if at is None:
                given, shape = params[self.renamed.get(name, name)], self.targets[name].shape
                made[name] = given if name not in self.renamed or given.shape == shape else given.reshape(shape)
            elif name not in made:
                if views:
                    raise AdapterError(
                        [Problem(f"{name!r}: no view of native storage, {self.what} computes it", (name,))]
                    )
                changed = self.changes[at]
                given_ = {n: params[n] for n in changed.sources}
                if (part := self.part(changed)) is not None:
                    given_ = {n: cut(t, part, changed.rows[n], n) for n, t in given_.items()}
                made |= blockwise(changed.change, given_, self._shapes, changed.block)
        return made

    def within(self, after: TablePlan) -> "tuple[CodecPlan, TablePlan]":
        """Both plans, where only a range of the first axis is made of what the table would then take that range of."""
        asked: dict[str, tuple[str, range]] = {}
        for group in after.groups:
            first = group.dims("source")[:1]
            axis = first[0][0] if first and len(first[0]) == 1 else ""
            if axis in group.window and axis not in group.local and len(group.window[axis]) < group.sizes[axis]:
                asked |= dict.fromkeys(group.sources, (axis, group.window[axis]))
        whole = {
            t
            for c in self.changes
            if {c.rows.get(t) for t in c.targets} - {0, 1} or len({asked.get(t) for t in c.targets if c.rows[t]}) != 1
            for t in c.targets
        }
        asked = {n: a for n, a in asked.items() if n in self.maker and n not in whole}
        if not asked:
            return self, after
        shapes = {n: (len(r), *self.targets[n].shape[1:]) for n, (_, r) in asked.items()}
        targets = self.targets | {n: TensorSpec(shape, self.targets[n].dtype) for n, shape in shapes.items()}
        local = lambda group: {asked[n][0] for n in group.sources if n in asked}
        groups = tuple(replace(g, local=g.local | local(g)) for g in after.groups)
        made = replace(self, targets=targets, ranges={n: r for n, (_, r) in asked.items()})
        return made, replace(after, specs=targets, groups=groups)

    def __str__(self) -> str:
        return f"{len(self.changes):>8,} tensors: {self.what}" if self.changes else ""


def cut(tensor: Any, part: range, rows: int, name: str) -> Any:
    """The entries of the first axis that belong to a range of units.

    >>> import torch
    >>> cut(torch.arange(6), range(1, 2), 2, "w")  # units of two rows
    tensor([2, 3])
    """
    if not rows:
        return tensor
    if is_dtensor(tensor):
        raise AdapterError(
            [Problem(f"{name!r}: a DTensor, expected a plain tensor where a range is asked for", (name,))]
        )
    first = min(part.start * rows, tensor.shape[0])
    return tensor.narrow(0, first, min(part.stop * rows, tensor.shape[0]) - first)
