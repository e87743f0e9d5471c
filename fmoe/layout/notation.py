"""The notation: a rule pairs two addresses, each a name with captures and the axes of the tensor that bears it.

    "{pre}layers.{l}.mlp.experts.{e}.{g=gate|up}_proj.weight [i d]"
    "{pre}layers.{l}.mlp.experts.gate_and_up_projs [e d (g i)]"

A name captured on both sides indexes the relation; captured on one side only, it is an axis on the other. Since each
letter occurs once per side, a rule is a bijection, and its inverse is the pair swapped: nobody writes one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from fmoe.layout.eager.html import table_of
from fmoe.layout.spelled.address import Address, Atom, Capture
from fmoe.layout.spelled.bounds import Bound, size, where
from fmoe.types import AdapterError


@dataclass(frozen=True)
class Rule:
    """source <-> target: one relation between tensors of two layouts; `bounds` says which values a letter takes."""

    source: Address
    target: Address
    bounds: tuple[tuple[str, Bound], ...] = ()

    def __post_init__(self) -> None:
        if problem := self._malformed():
            raise AdapterError(f"rule {self}: {problem}")

    @cached_property
    def _hash(self) -> int:
        return hash((self.source, self.target, self.bounds))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Rule, (self.source, self.target, self.bounds)  # without what is cached: hashes differ between processes

    @cached_property
    def inverse(self) -> "Rule":
        made = object.__new__(Rule)  # well formed as this one is: what is asked of a rule is asked of both sides
        made.__dict__.update(source=self.target, target=self.source, bounds=self.bounds, inverse=self)
        return made

    def bind(self, sizes: Mapping[str, int | Iterable[int]]) -> "Rule":
        """The same rule with letters bounded: an int is a size, an iterable the values allowed."""
        new = {k: size(k, v) for k, v in sizes.items() if k in self.letters}
        bounds = tuple(sorted({**dict(self.bounds), **new}.items()))
        return interned(self.source.bind(sizes), self.target.bind(sizes), bounds)

    @cached_property
    def letters(self) -> frozenset[str]:
        """Everything that can be bounded: captures, axes, and the parts of a ragged one."""
        names = {*self.source.captures, *self.source.atoms, *self.target.captures, *self.target.atoms}
        return frozenset(label for a in names for label in a.split("|"))

    def __str__(self) -> str:
        indices = {*self.source.captures, *self.target.captures}
        return f"{self.source}  <->  {self.target}{where(self.bounds, indices)}"

    def _repr_html_(self) -> str:
        return table_of(str(self))

    @cached_property
    def bound(self) -> dict[str, Bound]:
        return dict(self.bounds)

    @cached_property
    def unsettled(self) -> str:
        """The capital of a shift by a size that is not known yet; none: empty."""
        return "".join(c.by for side in (self.source, self.target) for c in side.captures.values())[:1]

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Captured on both sides: what indexes the relation."""
        return tuple(n for n in self.source.captures if n in self.target.captures)

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """Captured in source names, an axis of target tensors; in the order of those axes."""
        return _one_sided(self.source, self.target)

    @cached_property
    def unstacked(self) -> tuple[str, ...]:
        """Captured in target names, an axis of source tensors."""
        return _one_sided(self.target, self.source)

    @cached_property
    def ragged(self) -> dict[Atom, str]:
        """Atom "q|k|v" -> the capture `{p=q|k|v}` whose parts it concatenates; p is an axis beside that capture."""
        found: dict[Atom, str] = {}
        for here, there in ((self.source, self.target), (self.target, self.source)):
            for atom in here.atoms:
                labels = frozenset(atom.split("|"))
                if len(labels) > 1:
                    found |= {atom: c.name for c in there.captures.values() if frozenset(c.choices) == labels}  # noqa: B035
        return found

    @cached_property
    def dims(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Each side's dimensions as tuples of axes; an explicit 1 is a dimension of no axis."""
        axes = (side.axes or () for side in (self.source, self.target))
        return tuple(tuple(tuple(self.ragged.get(a, a) for a in dim if a != "1") for dim in dims) for dims in axes)

    @cached_property
    def numbers(self) -> frozenset[str]:
        """The captures that are numbers: an axis somewhere, shifted, or a single letter. The others are text."""
        captures = [*self.source.captures.values(), *self.target.captures.values()]
        counted = self.stacked + self.unstacked
        return frozenset(
            c.name for c in captures if c.name in counted or len(c.name) == 1 or c.offset or c.by or c.width
        )

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a source of this shape has all dimensions whose sizes are known; a rule that spells none takes any.

        >>> from fmoe.layout.spelled.parsing import parse
        >>> square = Rule(parse("w [i d]"), parse("w [d i]")).bind({"i": 2, "d": 3})
        >>> square.fits((2, 3)), square.fits((3, 2))
        (True, False)
        """
        sizes = [[len(self.bound[a]) if a in self.bound else None for a in dim] for dim in self.dims[0]]
        same = lambda dim, n: None in dim or prod(dim) == n
        return not sizes or (len(shape) == len(sizes) and all(map(same, sizes, shape)))

    def indexed(self, name: str) -> bool:
        """Whether a capture is a number."""
        return name in self.numbers

    @cached_property
    def limited(self) -> tuple[str, ...]:
        """The source's captures of which the rule claims some numbers only: index in a bound, or shifted."""
        shifted = {c.name for side in (self.source, self.target) for c in side.captures.values() if c.offset}
        bounded = {*self.shared} & {*self.bound} & self.numbers
        return tuple(n for n in self.source.captures if n in bounded | shifted)

    def _malformed(self) -> str | None:
        for side in (self.source, self.target):
            names = [p.name for p in side.parts if isinstance(p, Capture)]
            if len(set(names)) < len(names):
                return f"a name is captured twice in {side.name}"
            if len(set(side.atoms)) < len(side.atoms):
                return f"an axis occurs twice in [{side}]"
        if (self.source.axes is None) != (self.target.axes is None):
            return "one side has axes and the other none"
        unpaired = [a for side in (self.source, self.target) for a in side.atoms if "|" in a and a not in self.ragged]
        if unpaired:
            return f"({unpaired[0]}) needs a capture {{p={unpaired[0]}}} with an axis p on the other side"
        for name in self.shared:
            a, b = self.source.captures[name].choices, self.target.captures[name].choices
            if len(a) != len(b):
                return f"{{{name}}} has {len(a)} choices in the source and {len(b)} in the target"
        for name, bound in self.bounds:
            sized = name not in self.shared
            if not bound or sized and (not isinstance(bound, range) or bound.start or bound.step != 1):
                return f"{name} is bounded by {bound}, expected " + ("a size" if sized else "some numbers")
        sides = ("left", self.source, self._letters(self.source)), ("right", self.target, self._letters(self.target))
        for (here, side, letters), (there, _, others) in (sides, sides[::-1]):
            if lost := sorted(letters - others):
                told = [f"{n!r} is {'a capture' if n in side.captures else 'an axis'} on the {here}" for n in lost]
                return f"{', '.join(told)}, and nothing on the {there}: a letter is a capture or an axis on both sides"
        return None

    def _letters(self, side: Address) -> set[str]:
        parts = {self.ragged.get(a, a) for a in side.atoms}
        if both := (parts & set(side.captures)) - set(self.ragged.values()):
            raise AdapterError(f"rule {self}: {', '.join(sorted(both))} is both a capture and an axis of {side}")
        return parts | set(side.captures)


@lru_cache(maxsize=1 << 13)
def interned(source: Address, target: Address, bounds: tuple[tuple[str, Bound], ...] = ()) -> Rule:
    """The rule of two addresses: of equal ones the same, so that what is found out about it is found out once."""
    return Rule(source, target, bounds)


def _one_sided(here: Address, there: Address) -> tuple[str, ...]:
    by_labels = {frozenset(c.choices): c.name for c in here.captures.values() if c.choices}
    names = [by_labels.get(frozenset(a.split("|")), a) if "|" in a else a for a in there.atoms]
    return tuple(n for n in names if n in here.captures)
