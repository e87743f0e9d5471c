"""A name of a tensor that another name already holds: one (`Alias`), or as many as a pattern spells (`Copies`)."""

from dataclasses import dataclass, replace
from functools import cached_property

from fmoe.layout.notation import Rule, interned
from fmoe.layout.spelled.address import Address
from fmoe.layout.spelled.bounds import Bound, where
from fmoe.types import AdapterError, brief


@dataclass(frozen=True)
class Alias:
    """A HF name for a tensor that another HF name already holds, such as a tied `lm_head.weight`."""

    name: str
    of: str
    flipped: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and isinstance(self.of, str)):
            raise AdapterError(f"alias {brief(self.name)} of {brief(self.of)}: expected names")
        if self.name == self.of:
            raise AdapterError(f"alias {self.name!r} of itself: expected the name of another tensor")

    @cached_property
    def inverse(self) -> "Alias":
        return replace(self, flipped=not self.flipped)

    def __str__(self) -> str:
        return f"alias {self.name}   of {self.of}"


@dataclass(frozen=True)
class Copies:
    """HF names that a pattern spells, each for a tensor that another name already holds (`layout.spelled.copies`)."""

    name: Address
    of: Address
    bounds: tuple[tuple[str, Bound], ...] = ()
    flipped: bool = False

    def __post_init__(self) -> None:
        bounded, captures = dict(self.bounds), self.name.captures
        if lost := [n for n in self.of.captures if n not in captures]:
            raise AdapterError(f"{self}: {{{lost[0]}}} is captured in what the copies are of, and not in their name")
        if loose := [n for n in captures if n not in self.of.captures and not bounded.get(n)]:
            raise AdapterError(f"{self}: how many copies? Fix: bound {loose[0]}, as in {loose[0]}=range(1, 4)")
        if self.name.axes is not None or self.of.axes is not None:
            raise AdapterError(f"{self}: copies are alike, expected names without axes")

    @cached_property
    def inverse(self) -> "Copies":
        return replace(self, flipped=not self.flipped)

    @cached_property
    def copy(self) -> Rule:
        """x <-> x: whose names these are."""
        return interned(self.name, self.name, self.bounds)

    @cached_property
    def original(self) -> Rule:
        return interned(self.of, self.of, tuple((n, bound) for n, bound in self.bounds if n in self.of.captures))

    def __str__(self) -> str:
        return f"alias {self.name}   of {self.of}{where(self.bounds, self.name.captures)}"
