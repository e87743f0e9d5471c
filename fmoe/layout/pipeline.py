"""The plan over stages in a row: what comes out, what depends on what, and running it on tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from fmoe.layout.axes import Copy, Group
from fmoe.layout.eager.html import table_of
from fmoe.layout.eager.kinds import movable
from fmoe.layout.entries import walk
from fmoe.layout.grouping import Specs
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule
from fmoe.layout.plan import TablePlan
from fmoe.layout.proved.idle import idle
from fmoe.layout.stage import Stage, StagePlan
from fmoe.layout.units import Unit, in_order, joined
from fmoe.types import TensorSpec, human


@dataclass(frozen=True)
class Plan:
    """What an adapter will do to given names, shapes and dtypes: proved bijective before any data is touched.

    stages: one plan for each of the adapter's stages. specs: what goes in. made_of: the stages themselves, resolved.
    """

    stages: tuple[StagePlan, ...]
    specs: Specs
    made_of: tuple[Stage, ...] = field(default=(), compare=False, repr=False)

    @property
    def narrowed(self) -> frozenset[str]:
        """The axes of which only a range comes out."""
        return frozenset().union(*(stage.narrowed for stage in self.stages))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is told beside: rules of one's own that match no name, values that come back near and not equal.

        >>> import fmoe, torch
        >>> fmoe.rename("self_attn.", "attention.").plan({"a.self_attn.q": torch.ones(3)}).notes[0][:60]
        'rule self_attn.{rest}  <->  attention.{rest} matches no name'
        """
        names, made, several = self.specs, dict[str, None](), len(self.stages) > 1
        for k, (stage, plan) in enumerate(zip(self.made_of, self.stages, strict=False)):
            said = idle(getattr(stage, "entries", ()), names) if getattr(stage, "heard", False) else ()
            made |= dict.fromkeys(f"stage {k + 1} of {len(self.stages)}: {text}" if several else text for text in said)
            made |= dict.fromkeys(text for side in _sides(plan) for text in side.notes)
            made |= dict.fromkeys(getattr(plan, "notes", ()))
            names = plan.targets
        return tuple(made)

    @cached_property
    def targets(self) -> dict[str, TensorSpec]:
        """The abstract result: the name, shape and dtype of everything that comes out, in the order of `units`."""
        made = self.stages[-1].targets if self.stages else self.specs
        return {name: made[name] for _, targets in self._units for name in targets}

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that are read."""
        return tuple(name for sources, _ in self.units() for name in sources)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of everything that comes out."""
        return sum(spec.nbytes for spec in self.targets.values())

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """Every strided copy, of the stages that are tables. Offsets and strides count elements."""
        tables = [t for stage in self.stages for t in _tables(stage)]
        return tuple(copy for table in tables for copy in table.copies())

    def stacks(self, axis: str) -> dict[str, TensorSpec]:
        """The targets of layout rules whose first dimension is this axis, under the names that come out.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "w [e d]").plan({"w.0": torch.ones(3), "w.1": torch.ones(3)})
        >>> plan.stacks("e")
        {'w': TensorSpec(shape=(2, 3), dtype=torch.float32)}
        """
        found: set[str] = set()
        for stage in self.stages:
            moved = {s: t for sources, targets in stage.units() for s in sources for t in targets if s in found}
            found = set(moved.values())
            if isinstance(stage, TablePlan):
                found |= {t for g in stage.groups if g.dims("target")[:1] == ((axis,),) for t in g.targets}
            found |= {t for side in _sides(stage) for t in side.stacks(axis)}
        return {n: self.targets[n] for n in self.targets if n in found}

    def units(self) -> Iterator[tuple[list[str], list[str]]]:
        """(sources, targets) that depend on each other and on nothing else: what can be converted alone.

        Usually one native tensor and the HF tensors that make it. In the order of the first target's name, where a
        number counts by its value (`layers.2` before `layers.10`); the targets of one unit in the order of their rule:
        expert by expert. The names alone settle it, so it is the same in every process.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "w [e d]").plan({"w.0": torch.ones(3), "w.1": torch.ones(3)})
        >>> list(plan.units())
        [(['w.0', 'w.1'], ['w'])]
        """
        return iter(self._units)

    @cached_property
    def _units(self) -> list[Unit]:
        return in_order(joined(self.stages, self._used) if self.stages else (([n], [n]) for n in self.specs))

    def gathered(self, axis: str) -> set[str]:
        """The inputs that are each a part along an axis of one tensor that comes out.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "w [e d]").plan({"w.0": torch.ones(3), "w.1": torch.ones(3)})
        >>> sorted(plan.gathered("e"))
        ['w.0', 'w.1']
        """
        return self._inputs(lambda group: axis in group.rule.stacked)

    def touching(self, axis: str) -> set[str]:
        """The inputs that have this axis.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "w [e d]").plan({"w.0": torch.ones(3), "w.1": torch.ones(3)})
        >>> sorted(plan.touching("d"))
        ['w.0', 'w.1']
        """
        return self._inputs(lambda group: axis in group.sizes)

    def numbered(self, axis: str) -> set[str]:
        """The inputs that are read whole whatever range of this axis is asked for: names number it on both sides.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "v.{e} [d]").plan({"w.0": torch.ones(3), "w.1": torch.ones(3)})
        >>> sorted(plan.numbered("e")), sorted(plan.numbered("d"))
        (['w.0', 'w.1'], [])
        """
        found, into = set[str](), [self.specs, *(plan.targets for plan in self.stages)]
        for k, stage in reversed(list(enumerate(self.made_of))):
            found = {s for t in found for s in self._back[k].get(t, [])}
            rules = [e for e in walk(getattr(stage, "entries", ())) if isinstance(e, Rule) and axis in e.shared]
            names = Names(into[k]) if rules else Names(())
            found |= {n for rule in rules for _, _, rows in hits(rule, names) for n in rows.names}
            found |= {n for side in _sides(self.stages[k]) for n in side.numbered(axis)}
        return (found & set(self.sources)) - self.touching(axis) if found else found

    def _inputs(self, choose: Callable[[Group], bool]) -> set[str]:
        found: set[str] = set()
        for k, stage in reversed(list(enumerate(self.stages))):
            found = {s for t in found for s in self._back[k].get(t, [])}
            if isinstance(stage, TablePlan):
                found |= {s for group in stage.groups if choose(group) for s in group.sources}
            found |= {s for side in _sides(stage) for s in side._inputs(choose)}
        return found

    @cached_property
    def _used(self) -> list[dict[str, None] | None]:
        """For each stage, the targets that later stages need: None for all, as where no axis is restricted."""
        used: list[dict[str, None] | None] = [None] * len(self.stages)
        if self.narrowed:
            for k in range(len(self.stages) - 1, 0, -1):
                need = used[k]
                units = (s for s, t in self.stages[k].units() if need is None or not need.keys().isdisjoint(t))
                used[k - 1] = dict.fromkeys(name for sources in units for name in sources)
        return used

    def run(
        self, params: Mapping[str, Tensor], only: Iterable[str] | None = None, *, views: bool = False
    ) -> dict[str, Tensor]:
        """The targets (or only those of some units), from tensors of the planned names; writes to no argument.

        In the order of `targets`, or of `only`. Of DTensors, what lives wholly on other ranks is left out.

        >>> import fmoe, torch
        >>> plan = fmoe.rule("w.{e} [d]", "w [e d]").plan({"w.0": torch.ones(3), "w.1": torch.ones(3)})
        >>> plan.run({"w.0": torch.zeros(3), "w.1": torch.ones(3)})["w"].tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
        """
        asked = self.targets if only is None else dict.fromkeys(only)
        wanted: list[Iterable[str] | None] = [*self._used]
        if only is not None and wanted:
            wanted[-1] = asked
            for k in range(len(self.stages) - 1, 0, -1):
                needed = (source for target in wanted[k] or () for source in self._back[k][target])
                wanted[k - 1] = dict.fromkeys(needed)
        for k, stage in enumerate(self.stages):
            names, made = wanted[k], wanted[k - 1] if k else ()
            gone = set(self.stages[k - 1].targets if made is None else made) - params.keys()
            if gone:  # what only other ranks have of DTensors, and all that depends on it
                names = [t for t in (stage.targets if names is None else names) if gone.isdisjoint(self._back[k][t])]
            with movable(params):
                params = stage.run(params, names, views=views)
        return {n: params[n] for n in asked if n in params}

    @cached_property
    def _back(self) -> list[dict[str, list[str]]]:
        """For each stage, the sources of each target."""
        return [{t: sources for sources, targets in stage.units() for t in targets} for stage in self.stages]

    def __repr__(self) -> str:
        return f"Plan({self._head})"

    def _repr_html_(self) -> str:
        return table_of(str(self))

    @property
    def _head(self) -> str:
        read = len(self.sources) if self.narrowed else len(self.specs)
        there, back = (f"{n:,} tensor{'s' * (n != 1)}" for n in (read, len(self.targets)))
        return f"{there} -> {back}, {human(self.nbytes)}, proved bijective"

    def __str__(self) -> str:
        return "\n".join([self._head, *filter(None, map(str, self.stages)), *(f"note: {n}" for n in self.notes)])


def _sides(stage: StagePlan) -> tuple[Plan, ...]:
    """The plans that a stage of several adapters side by side is made of."""
    return getattr(stage, "plans", ())


def _tables(stage: StagePlan) -> list[TablePlan]:
    return [stage] if isinstance(stage, TablePlan) else [t for p in _sides(stage) for s in p.stages for t in _tables(s)]
