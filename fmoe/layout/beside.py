"""Two adapters side by side: each takes the names that its own entries claim or spell, and no name is taken by both."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import Tensor

from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.layout.notation import Rule
from fmoe.layout.pipeline import Plan
from fmoe.layout.planning import plan_stages, resolve_stages
from fmoe.layout.proved.back import loose_parts
from fmoe.layout.stage import Stage
from fmoe.layout.table import Table
from fmoe.types import AdapterError, Problem, TensorSpec

Stages = tuple[Stage, ...]


def beside(left: Stages, right: Stages) -> Stages:
    """left | right: one table where both are a single table, else a stage that runs both."""
    if len(left) == len(right) == 1 and isinstance(left[0], Table) and isinstance(right[0], Table):
        heard = left[0].heard and right[0].heard
        return (Table(tuple(dict.fromkeys(left[0].entries + right[0].entries)), heard=heard),)
    if len(left) == 1 and isinstance(left[0], Beside) and _is_table(left[0].right) and _is_table(right):
        return (Beside(left[0].left, beside(left[0].right, right)),)
    return (Beside(left, right),)


def check_parts(stages: Stages) -> None:
    """A ragged axis with parts of unknown length is refused where adapters are joined, before any tensor is there."""
    rules = (r for stage in stages for r in getattr(stage, "rules", list)())
    if problems := list(dict.fromkeys(filter(None, map(loose_parts, rules)))):
        raise AdapterError(problems)


def _is_table(stages: Stages) -> bool:
    return len(stages) == 1 and isinstance(stages[0], Table)


@dataclass(frozen=True)
class BesidePlan:
    plans: tuple[Plan, Plan]
    targets: dict[str, TensorSpec]

    @property
    def narrowed(self) -> frozenset[str]:
        return frozenset().union(*(p.narrowed for p in self.plans))

    def units(self) -> Iterator[tuple[list[str], list[str]]]:
        return chain(*(p.units() for p in self.plans))

    def run(
        self, params: Mapping[str, Tensor], only: Iterable[str] | None = None, *, views: bool = False
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for plan in self.plans:
            mine = None if only is None else [n for n in only if n in plan.targets]
            made |= plan.run(params, mine, views=views)
        return made

    def __str__(self) -> str:
        return "\n|\n".join(str(stage) for plan in self.plans for stage in plan.stages)


@dataclass(frozen=True)
class Beside:
    """left | right, where one of them has several stages."""

    left: Stages
    right: Stages
    guards: tuple[bool, bool] = field(default=(True, True), compare=False, repr=False, kw_only=True)

    @property
    def has_experts(self) -> bool:
        return any(getattr(stage, "has_experts", False) for stage in self.left + self.right)

    def rules(self) -> list[Rule]:
        return [r for stage in self.left + self.right for r in getattr(stage, "rules", list)()]

    def guarded(self, there: bool, back: bool) -> "Beside":
        return replace(self, guards=(there, back))

    @property
    def inverse(self) -> "Beside":
        return Beside(*(tuple(s.inverse for s in reversed(side)) for side in (self.left, self.right)))

    @property
    def lossless(self) -> bool:
        return all(s.lossless for s in self.left + self.right)

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {n: options for stage in self.left + self.right for n, options in stage.choices().items()}

    def axes(self) -> frozenset[str]:
        return frozenset().union(*(stage.axes() for stage in self.left + self.right))

    def choose(self, choices: Mapping[str, Any]) -> "Beside":
        return Beside(*(tuple(s.choose(choices) for s in side) for side in (self.left, self.right)))

    def resolve(self, names: Names, *, default: bool) -> "Beside":
        left, right = self._split(names)
        return Beside(
            resolve_stages(self.left, Names(left, names.specs)), resolve_stages(self.right, Names(right, names.specs))
        )

    def rename(self, names: Names) -> list[str]:
        made = []
        for stages, mine in zip((self.left, self.right), self._split(names), strict=True):
            for stage in stages:
                mine = stage.rename(Names(mine))
            made += mine
        return made

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> BesidePlan:
        left, right = (
            plan_stages(stages, {n: specs[n] for n in mine}, window, local, self.guards)
            for stages, mine in zip((self.left, self.right), self._split(names), strict=True)
        )
        if twice := [n for n in left.targets if n in right.targets]:
            made = _sources((left, right), twice)
            text = f"two sources for one target, one on each side of |: {some(made)} give {some(twice)}"
            raise AdapterError([Problem(text, (*made, *(n for n in twice if n not in made)))])
        back = self.inverse._split(Names(chain(left.targets, right.targets)))
        for mine, theirs in zip((left, right), reversed(back), strict=True):
            if astray := [n for n in theirs if n in mine.targets]:
                made = _sources((mine,), astray)
                text = f"{some(made)} would become {some(astray)}, which on the way back the other side of | would take"
                raise AdapterError([Problem(text, (*made, *(n for n in astray if n not in made)))])
        return BesidePlan((left, right), left.targets | right.targets)

    def _split(self, names: Names) -> tuple[list[str], list[str]]:
        """Each side's names: those that its rules claim, then those that its keeps spell, the right one's first.

        What neither says goes to the side that keeps `{rest}`.
        """
        claims = [_claimed(side, names) for side in (self.left, self.right)]
        if both := [n for n in claims[0] if n in claims[1]]:
            raise AdapterError([Problem(f"{some(both)}: claimed on both sides of |", tuple(both))])
        taken = {n: bool(side) for side in (0, 1) for n in claims[side]}
        free = Names([n for n in names.names if n not in taken])
        left, right = _kept(self.left, free), _kept(self.right, free)
        sides: tuple[list[str], list[str]] = ([], [])
        for name in names.names:
            spelled = right.get(name) or name in right and name not in left
            sides[taken.get(name, bool(spelled))].append(name)
        return sides


def _sources(plans: tuple[Plan, ...], targets: list[str]) -> list[str]:
    """What these targets are made of."""
    wanted = set(targets)
    return [s for plan in plans for sources, made in plan.units() if not wanted.isdisjoint(made) for s in sources]


def _claimed(stages: Stages, names: Names) -> dict[str, None]:
    """The names that the first of the stages to have entries claims with them, what it merely keeps left out."""
    for stage in stages:
        if isinstance(stage, Table):
            return dict.fromkeys(stage.claimed(names))
        if isinstance(stage, Beside):
            return _claimed(stage.left, names) | _claimed(stage.right, names)
    return {}


def _kept(stages: Stages, names: Names) -> dict[str, bool]:
    """The names that the same stage keeps, and whether a keep spells them: `{rest}` spells none."""
    for stage in stages:
        if isinstance(stage, Table):
            return stage.kept(names)
        if isinstance(stage, Beside):
            left, right = _kept(stage.left, names), _kept(stage.right, names)
            return left | {n: spelled or left.get(n, False) for n, spelled in right.items()}
    return {}
