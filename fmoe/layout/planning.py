"""Stages planned and resolved one after the other, each for what comes out of the one before."""

from collections.abc import Iterable, Mapping

from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.layout.stage import Stage, StagePlan
from fmoe.types import AdapterError, Problem


def plan_stages(stages: tuple[Stage, ...], specs: Specs, window: Window, local: frozenset[str]) -> Plan:
    """The stages' plans in a row, each made for what comes out of the one before; open choices settled as they come."""
    plans, settled, problems = list[StagePlan](), list[Stage](), list[Problem]()
    at, names = specs, Names(specs)
    for stage in stages:
        if plans:
            was, at = at, plans[-1].targets
            names = names if at.keys() == was.keys() else Names(at)
        try:
            settled.append(stage.resolve(names, default=True))
            plans.append(settled[-1].plan(at, names, window, local))
            if (within := getattr(plans[-2:][0], "within", None)) and isinstance(plans[-1], TablePlan):
                plans[-2:] = within(plans[-1])  # a codec makes no more than the table takes
        except AdapterError as error:
            problems += _traced(error.found, settled[: len(plans)], plans)
            if error.rest is None:
                break
            plans.append(error.rest)
        local |= plans[-1].narrowed
    if problems:
        raise AdapterError(problems)
    return Plan(tuple(plans), specs)


def _traced(problems: Iterable[Problem], stages: list[Stage], plans: list[StagePlan]) -> list[Problem]:
    """The problems told in the names that went into the first stage, where a name goes back to just one."""
    told = list(problems)
    for stage, plan in zip(reversed(stages), reversed(plans), strict=True):
        origins = {t: s[0] for s, targets in plan.units() if len(s) == 1 for t in targets}
        told = [_renamed(problem, stage.inverse, origins) for problem in told]
    return told


def _renamed(problem: Problem, back: Stage, origins: Mapping[str, str]) -> Problem:
    text, keys, place = problem.text, [], {key: i for i, key in enumerate(problem.keys)}
    for key in sorted(problem.keys, key=len, reverse=True):
        if (origin := origins.get(key)) is None:  # a name that is not there: what would it be called?
            found = back.rename(Names([key]))
            origin = found[0] if len(found) == 1 else key
        text = text.replace(repr(key), repr(origin)) if origin != key else text
        keys.append((place[key], origin))
    return Problem(text, tuple(origin for _, origin in sorted(keys)))


def resolve_stages(stages: tuple[Stage, ...], names: Names) -> tuple[Stage, ...]:
    settled = []
    for stage in stages:
        settled.append(stage.resolve(names, default=False))
        names = Names(settled[-1].resolve(names, default=True).rename(names))
    return tuple(settled)
