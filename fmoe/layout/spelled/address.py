"""An address: a name with captures in braces, and the axes of the tensor that bears it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

Atom = str  # an axis letter, "1", or the labels "q|k|v" of a ragged concatenation


@dataclass(frozen=True)
class Capture:
    """`{name}`, `{name=a|b}` (literal choices, numbered from 0) or `{label=name+offset}` (the number, shifted).

    by: the capital in `{k=e+E}` until `bind` knows that size, which then is the offset. width: of `{r:02}`, a number
    that is spelled with that many digits at least, the first ones zeros.
    """

    name: str
    choices: tuple[str, ...] = ()
    offset: int = 0
    label: str = ""
    by: str = ""
    width: int = 0

    def bind(self, sizes: Mapping[str, int | Iterable[int]]) -> "Capture":
        """The same capture, shifted by the size that its capital stands for, if that is among the sizes."""
        size = sizes.get(self.by.lower()) if self.by else None
        return replace(self, offset=size, by="") if isinstance(size, int) else self

    def __str__(self) -> str:
        if self.choices:
            return f"{{{self.name}={'|'.join(self.choices)}}}"
        width = f":0{self.width}" if self.width else ""
        if self.offset or self.label:
            return f"{{{self.label}{width}={self.name}{f'+{self.by}' if self.by else f'{self.offset:+d}'}}}"
        return f"{{{self.name}{width}}}"


@dataclass(frozen=True)
class Address:
    """A name with captures, and its tensor's dimensions, each a tuple of atoms; axes None: any tensor."""

    parts: tuple[str | Capture, ...]
    axes: tuple[tuple[Atom, ...], ...] | None = None

    @cached_property
    def _hash(self) -> int:
        return hash((self.parts, self.axes))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Address, (self.parts, self.axes)  # without what is cached: hashes differ between processes

    @cached_property
    def captures(self) -> dict[str, Capture]:
        return {p.name: p for p in self.parts if isinstance(p, Capture)}

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        return tuple(a for dim in self.axes or () for a in dim if a != "1")

    @property
    def name(self) -> str:
        return "".join(map(str, self.parts))

    def bind(self, sizes: Mapping[str, int | Iterable[int]]) -> "Address":
        """The same address, its shifts by a size settled."""
        if not any(c.by for c in self.captures.values()):
            return self
        return Address(tuple(p.bind(sizes) if isinstance(p, Capture) else p for p in self.parts), self.axes)

    def __str__(self) -> str:
        if self.axes is None:
            return self.name
        dims = (d[0] if len(d) == 1 and "|" not in d[0] else f"({' '.join(d)})" for d in self.axes)
        return f"{self.name} [{' '.join(dims)}]"
