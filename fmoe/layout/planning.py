"""Stages planned and resolved one after the other, each for what comes out of the one before."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from fmoe.folding import meant
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.layout.stage import Stage, StagePlan
from fmoe.types import AdapterError, Problem, brief


def plan_stages(
    stages: tuple[Stage, ...],
    specs: Specs,
    window: Window,
    local: frozenset[str],
    guards: tuple[bool, bool] = (True, True),
) -> Plan:
    """The stages' plans in a row, each made for what comes out of the one before; open choices settled as they come.

    guards: as in `plan_table`. The first stage with a rule for experts, in each direction, has the guard: what it does
    not claim is refused there, and what it made is an expert's by right. Where no stage has one, all tables have it.
    """
    plans, settled, problems = list[StagePlan](), list[Stage](), list[Problem]()
    at, names = specs, Names(specs)
    experts = [k for k, stage in enumerate(stages) if getattr(stage, "has_experts", False)]
    for k, stage in enumerate(stages):
        if plans:
            was, at = at, plans[-1].targets
            names = names if at.keys() == was.keys() else _names(plans[-1])
        try:
            stage = stage.resolve(names, default=True)
            if hasattr(stage, "guarded"):
                there, back = (guards[0], guards[1]) if not experts else (k == experts[0], k == experts[-1])
                stage = stage.guarded(there and guards[0], back and guards[1])
            settled.append(stage)
            plans.append(stage.plan(at, names, window, local))
            if (within := getattr(plans[-2:][0], "within", None)) and isinstance(plans[-1], TablePlan):
                plans[-2:] = within(plans[-1])  # a codec makes no more than the table takes
        except AdapterError as error:
            problems += _traced(error.found, settled[: len(plans)], plans, len(stages))
            if error.rest is None:
                break
            plans.append(error.rest)
        local |= plans[-1].narrowed
    if problems:
        raise AdapterError(problems)
    return Plan(tuple(plans), specs, tuple(settled))


def _names(plan: StagePlan) -> Names:
    """The names of its targets: read already, where the plan is a table's."""
    found = getattr(plan, "names", None)
    return found if found is not None and found.names == list(plan.targets) else Names(plan.targets)


def _traced(problems: Iterable[Problem], stages: list[Stage], plans: list[StagePlan], of: int) -> Iterable[Problem]:
    """The problems of a stage. After codecs alone in the names that went into the first stage.

    After tables, which name things anew: in the names that go into the stage, those that they came from beside them.
    """
    before = list(zip(reversed(stages), reversed(plans), strict=True))
    if not any(hasattr(stage, "has_experts") for stage in stages):
        for stage, plan in before:
            origins = {t: s[0] for s, targets in plan.units() if len(s) == 1 for t in targets}
            problems = [_renamed(problem, stage.inverse, origins) for problem in problems]
        return problems
    made = [(stage.inverse, {t: s for s, targets in plan.units() for t in targets}) for stage, plan in before]
    return [_beside(problem, made, f"stage {len(stages) + 1} of {of}: ") for problem in problems]


def _beside(problem: Problem, made: list[tuple[Stage, dict[str, list[str]]]], stage: str) -> Problem:
    origins = problem.keys
    for back, sources in made:
        found = (sources.get(n) or back.rename(Names([n])) or [n] for n in origins)
        origins = tuple(dict.fromkeys(name for names in found for name in names))
    text = stage + problem.text + (f"; from {some(origins, 3)}" if origins != problem.keys else "")
    return Problem(text, origins)


def _renamed(problem: Problem, back: Stage, origins: Mapping[str, str]) -> Problem:
    text, keys, place = problem.text, [], {key: i for i, key in enumerate(problem.keys)}
    for key in sorted(problem.keys, key=len, reverse=True):
        if (origin := origins.get(key)) is None:  # a name that is not there: what would it be called?
            found = back.rename(Names([key]))
            origin = found[0] if len(found) == 1 else key
        text = text.replace(repr(key), repr(origin)) if origin != key else text
        keys.append((place[key], origin))
    return Problem(text, tuple(origin for _, origin in sorted(keys)))


def check_choices(choices: Mapping[str, Any]) -> None:
    """Raises AdapterError for a choice that is of no kind that any choice has.

    >>> check_choices({"layout": b"fused"})
    Traceback (most recent call last):
    fmoe.types.AdapterError: layout= is b'fused', expected a name, as layout='fused'
    """
    for name, value in choices.items():
        if not (value is None or isinstance(value, str | bool | int | float | range | list | tuple | torch.dtype)):
            raise AdapterError(f"{name}= is {brief(value)}, expected a name, as layout='fused'")


def chosen_stages(stages: tuple[Stage, ...], choices: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages with choices made. Raises AdapterError for a choice, or an option, that there is not."""
    check_choices(choices)
    known = {n: options for stage in stages for n, options in stage.choices().items()}
    if unknown := sorted(choices.keys() - known.keys() - {"quantization"}):
        told = "; ".join(f"{n}={' | '.join(map(repr, options))}" for n, options in known.items())
        told = f"{told or 'none, all are made'}{meant(unknown[0], known)}"
        raise AdapterError(f"no choice {', '.join(unknown)}: expected {told}")
    if (asked := choices.get("quantization")) not in (None, True, False):
        raise AdapterError(f"quantization={brief(asked)}: expected None, True or False")
    return tuple(stage.choose(choices) for stage in stages)


def _kept_specs(stage: Stage, new: list[str], specs: Mapping[str, Any]) -> dict[str, Any]:
    """The specs of what a stage that moves no axis makes: of numbers that keep their name, codes of 8 bits included."""
    floats = lambda spec: bool(getattr(getattr(spec, "dtype", None), "is_floating_point", False))
    return {} if stage.axes() else {n: specs[n] for n in new if n in specs and floats(specs[n])}


def check_ranges(stages: tuple[Stage, ...], window: Window) -> None:
    """Raises AdapterError for what is no range of one of the stages' axes."""
    axes = frozenset().union(*(stage.axes() for stage in stages))
    for axis, asked in window.items():
        sound = isinstance(asked, range) and asked.step == 1 and abs(asked.start) + abs(asked.stop) < 1 << 40
        if axis not in axes or not sound:
            moved = f"a range of one of the axes {', '.join(sorted(axes))}" if axes else "none: no axis moves here"
            expected = "a range in steps of 1, of numbers below 2**39" if axis in axes else moved
            told = asked_as(axis, asked, axes) or f"expected {expected}"
            raise AdapterError(f"{axis}={brief(asked)}: {told}")


def check_cut(plan: Plan, asked: Collection[str]) -> Plan:
    """The plan. Raises AdapterError where a range of these axes would leave tensors whole, numbered by their names."""
    for axis in asked:
        numbered = plan.numbered(axis)
        if lost := tuple(n for n in plan.specs if n in numbered):
            text = f"{some(lost)}: a range of {axis} is asked for, and names number it on both sides: nothing is cut"
            raise AdapterError([Problem(f"{text}. Fix: pass the tensors of those numbers alone, and no range", lost)])
    return plan


def asked_as(name: str, asked: Any, axes: Collection[str]) -> str:
    """How one asks for what `name=asked` means, where that is a part of an axis but not said so; else "".

    >>> asked_as("e", [0, 1], "de"), asked_as("e", 3, "de"), asked_as("experts", range(2), "de")
    ('expected range(0, 2)', 'expected a range, such as e=range(0, 2)', 'write e=range(0, 2)')
    """
    axis = "e" if name in ("expert", "experts") else name
    if axis not in axes or isinstance(asked, range) and axis == name:
        return ""
    ids = list(asked) if isinstance(asked, list | tuple) else []
    row = bool(ids) and all(type(i) is int for i in ids) and ids == [*range(ids[0], ids[0] + len(ids))]
    part = asked if isinstance(asked, range) else range(ids[0], ids[-1] + 1) if row else None
    told = brief(range(2) if part is None else part)
    if part is None:
        return f"expected a range, such as {axis}={told}"
    return f"write {axis}={told}" if axis != name else f"expected {told}"


def resolve_stages(stages: tuple[Stage, ...], names: Names) -> tuple[Stage, ...]:
    settled = []
    for stage in stages:
        settled.append(stage.resolve(names, default=False))
        if len(settled) < len(stages):
            new = settled[-1].resolve(names, default=True).rename(names)
            names = names if new == names.names else Names(new, _kept_specs(settled[-1], new, names.specs))
    return tuple(settled)
