"""Stages that change values on the way to another system, each with its inverse: a shift, -exp, a factor, padding.

Value    y = f(x) elementwise, x = g(y); not lossless, and g says how close it comes
Fill     a tensor that one side makes up: made one way; the other way checked to be what it was made as, and left out
Pad      rows of zeros behind a tensor's own: added one way; checked and cut the other
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import frexp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmoe.codecs import Change, Changed, CodecPlan
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.types import AdapterError, Problem, TensorSpec


@dataclass(frozen=True)
class Stateless:
    """What a stage of values that names no axis and has no choice says of itself."""

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {}

    def axes(self) -> frozenset[str]:
        return frozenset()

    def resolve(self, names: Names, *, default: bool) -> Any:
        return self

    def choose(self, choices: Mapping[str, Any]) -> Any:
        return self

    def rename(self, names: Names) -> list[str]:
        return names.names


@dataclass(frozen=True)
class Value(Stateless):
    """y = there(x) on every tensor whose name fits the pattern; `what` names the change, `bound` says how exact it is.

    there, back: names in `FUNCTIONS`; by: their number.
    """

    pattern: str
    function: str
    by: float = 0.0
    flipped: bool = False
    lossless: bool = False

    @property
    def inverse(self) -> "Value":
        return replace(self, flipped=not self.flipped)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        change = self._change()
        mine = [n for n in specs if re.fullmatch(self.pattern, n)]
        changed = tuple(Changed([n], [n], change, {n: 1}) for n in mine)
        return CodecPlan(dict(specs), changed, str(self), notes=self._told(mine))

    def _told(self, names: list[str]) -> tuple[str, ...]:
        function = FUNCTIONS[self.function]
        if not names or function.exact(self.by):
            return ()
        how = f"{'read from' if self.flipped else 'stored as'} {function.formula.format(by=self.by)}"
        again = "stored again" if self.flipped else "read again"
        near = f"{again}, equal to within {function.bound}, not bit for bit"
        return (f"values of {some(sorted(names))} are {how}: {near}",)

    def _change(self) -> Change:
        function, by = FUNCTIONS[self.function].ways[self.flipped], self.by
        return lambda params: {n: function(t, by) for n, t in params.items()}

    def __str__(self) -> str:
        function = FUNCTIONS[self.function]
        what = f"{function.formula.format(by=self.by)}; back to within {function.bound}"
        return f"{self.pattern}: {what}{' (backwards)' * self.flipped}"


def _minus_exp(x: Tensor, by: float) -> Tensor:
    return -torch.exp(x)


def _log_minus(y: Tensor, by: float) -> Tensor:
    """x with -exp(x) == y where there is one: the logarithm, moved by a few units in the last place."""
    exact = torch.log(-y.double())
    found = exact.to(y.dtype)
    best = found.clone()
    wrong = _minus_exp(found, by) != y
    unit = found.abs().clamp_min(2**-2) * torch.finfo(y.dtype).eps / 2
    for k in (1, -1, 2, -2, 3, -3, 4, -4, 6, -6, 8, -8):
        if not bool(wrong.any()):
            break
        moved = (exact + k * unit.double()).to(y.dtype)
        fits = wrong & (_minus_exp(moved, by) == y)
        best, wrong = torch.where(fits, moved, best), wrong & ~fits
    return best


class Function(NamedTuple):
    """ways: there and back. formula: what is stored of x. bound: how near x comes back; exact: equal, by a number."""

    ways: tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]
    formula: str
    bound: str
    exact: Callable[[float], bool] = lambda by: False


FUNCTIONS = {
    "shift": Function(
        (lambda x, by: x + by, lambda y, by: y - by),
        "x {by:+g}",
        "half a unit in the last place of what is stored",
    ),
    "-exp": Function((_minus_exp, _log_minus), "-exp(x)", "two units in the last place"),
    "times": Function(
        (lambda x, by: (x.double() * by).to(x.dtype), lambda y, by: (y.double() / by).to(y.dtype)),
        "x * {by:.6g}",
        "one unit in the last place",
        lambda by: frexp(by)[0] == 0.5,  # a power of two
    ),
}


@dataclass(frozen=True)
class Fill(Stateless):
    """For every tensor whose name fits `beside`, one more: `name` (groups of the pattern filled in) [its rows], zeros.

    lossy: values that are not what they were made as are left out all the same.
    """

    beside: str
    name: str
    dtype: torch.dtype = torch.float32
    lossy: bool = False
    flipped: bool = False

    @property
    def lossless(self) -> bool:
        return not self.lossy

    @property
    def inverse(self) -> "Fill":
        return replace(self, flipped=not self.flipped)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        anchors = {n: m.expand(self.name) for n in specs if (m := re.fullmatch(self.beside, n))}
        if self.flipped:
            there = {n: made for n, made in anchors.items() if made in specs}
            gone = set(there.values())
            wrong = [n for a, n in there.items() if specs[n].shape != specs[a].shape[:1]]
            problems = [
                Problem(f"{n!r}: shape {list(specs[n].shape)}, expected one for each expert", (n,)) for n in wrong
            ]
            if problems:
                raise AdapterError(problems)
            changes = tuple(Changed([a, n], [a], self._checked(a, n)) for a, n in there.items())
            return CodecPlan({n: s for n, s in specs.items() if n not in gone}, changes, str(self))
        if twice := tuple(n for n in anchors.values() if n in specs):
            raise AdapterError([Problem(f"{twice[0]!r} is there, and would be made", twice)])
        made = {n: TensorSpec(specs[a].shape[:1], self.dtype) for a, n in anchors.items()}
        return CodecPlan(
            {**specs, **made}, tuple(Changed([a], [n], self._made(n)) for a, n in anchors.items()), str(self)
        )

    def _made(self, name: str) -> Change:
        def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
            (beside,) = params.values()
            return {name: torch.zeros(beside.shape[:1], dtype=self.dtype, device=beside.device)}

        return change

    def _checked(self, anchor: str, name: str) -> Change:
        def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = params[name]
            if not self.lossy and not found.is_meta and bool((found != 0).any()):
                text = f"{name!r} is not zero, and Hugging Face's layout has no place for it; lossy=True leaves it out"
                raise AdapterError([Problem(text, (name,))])
            return {anchor: params[anchor]}

        return change

    def __str__(self) -> str:
        return f"fill {self.name} with zeros, one for each row of {self.beside}{' (backwards)' * self.flipped}"


@dataclass(frozen=True)
class Pad(Stateless):
    """Tensors that fit the pattern have `true` rows in Hugging Face's layout and a multiple of `multiple` in the other.

    Backwards any number of rows from `true` on is taken, and what is cut off must be zero. lossy: or anything.
    """

    pattern: str
    true: int | None
    multiple: int = 1
    lossy: bool = False
    flipped: bool = False

    @property
    def lossless(self) -> bool:
        return not self.lossy

    @property
    def inverse(self) -> "Pad":
        return replace(self, flipped=not self.flipped)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        targets, changes = dict(specs), []
        for name in (n for n in specs if re.fullmatch(self.pattern, n)):
            rows = specs[name].shape[0]
            want = self._want(name, rows)
            if want != rows:
                targets[name] = TensorSpec((want, *specs[name].shape[1:]), specs[name].dtype)
                changes.append(Changed([name], [name], self._resized(name, want)))
        return CodecPlan(targets, tuple(changes), str(self))

    def _want(self, name: str, rows: int) -> int:
        if not self.flipped:
            return -(-rows // self.multiple) * self.multiple
        if self.true is not None and rows < self.true:
            text = f"{name!r}: {rows} rows, expected vocab_size={self.true} at least"
            raise AdapterError([Problem(text, (name,))])
        return rows if self.true is None else self.true

    def _resized(self, name: str, want: int) -> Change:
        def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = params[name]
            if want > given.shape[0]:
                more = given.new_zeros((want - given.shape[0], *given.shape[1:]))
                return {name: torch.cat([given, more])}
            if not self.lossy and not given.is_meta and bool((given[want:] != 0).any()):
                text = f"{name!r}: the rows from {want} on are padding, and not zero; lossy=True cuts them off"
                raise AdapterError([Problem(text, (name,))])
            return {name: given[:want]}

        return change

    def __str__(self) -> str:
        return f"pad {self.pattern} to a multiple of {self.multiple} rows{' (backwards)' * self.flipped}"
