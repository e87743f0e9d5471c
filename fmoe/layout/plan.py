"""A plan: what a stage will do to given names, shapes and dtypes, proved before any data is touched.

The proof. A rule relates atomic axes one to one, so the copies of a group tile its tensors exactly when (1) the
sources are the whole grid of stacked captures, once each, (2) every source has the shape that the axes say, and one
dtype; over the whole plan, (3) each name is claimed once and (4) no two targets share a name. And the way back is
planned too (`proved/back.py`): it claims every target for what made it, and can split what was merged. All are linear
in the names.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from torch import Tensor

from fmoe.folding import short
from fmoe.layout.axes import Copy, Group
from fmoe.layout.claims import Claims, claim, some
from fmoe.layout.eager.converting import NotAView, convert
from fmoe.layout.entries import Entry
from fmoe.layout.grouping import Claimed, Specs, Window, Wrong
from fmoe.layout.names import Names
from fmoe.layout.proved.back import way_back
from fmoe.layout.proved.together import apart, unequal
from fmoe.layout.sharded.shards import convert_sharded, same_parts
from fmoe.layout.spelled.alias import Alias, Copies
from fmoe.layout.spelled.copies import back
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Problem, TensorSpec, human


@dataclass(frozen=True)
class TablePlan:
    """One table's plan. `targets`: what comes out, in the order of the sources' names; names: theirs, already read."""

    specs: Specs
    groups: tuple[Group, ...]
    pairs: dict[str, str]
    targets: dict[str, TensorSpec]
    aliases: tuple[Alias, ...] = ()
    dropped: tuple[str, ...] = ()
    names: Names | None = field(default=None, compare=False, repr=False)

    @cached_property
    def makers(self) -> dict[str, Group | str]:
        """Each target, and what makes it: a group, or the one source that is renamed to it."""
        groups = {t: group for group in self.groups for t in group.targets}
        return groups | {t: s for s, t in self.pairs.items()}

    @cached_property
    def _originals(self) -> dict[str, str]:
        """The aliases that come out, and the target that each is another name of."""
        return {a.name: a.of for a in self.aliases if a.flipped}

    @property
    def narrowed(self) -> frozenset[str]:
        """The axes of which only a range comes out."""
        return frozenset().union(*(g.window for g in self.groups))

    def units(self) -> Iterator[tuple[list[str], list[str]]]:
        """Sources and targets that depend on each other, and on nothing else."""
        made = ((group.sources, group.targets) for group in self.groups)
        for sources, targets in chain(made, (([s], [t]) for s, t in self.pairs.items())):
            yield sources + self._aliased(sources, False), targets + self._aliased(targets, True)

    def _aliased(self, names: list[str], flipped: bool) -> list[str]:
        return [a.name for a in self.aliases if a.flipped == flipped and a.of in names]

    def copies(self) -> Iterator[Copy]:
        for group in self.groups:
            yield from group.copies()
        for source, target in self.pairs.items():
            spec = self.specs[source]
            yield Copy(source, target, (spec.numel,), 0, (1,), 0, (1,), spec.dtype)

    def run(
        self, params: Mapping[str, Tensor], only: Iterable[str] | None = None, *, views: bool = False
    ) -> dict[str, Tensor]:
        """The targets (or only some), from tensors of the planned names; views: raise rather than copy.

        Of DTensors, what lives wholly on other ranks is left out.
        """
        made: dict[str, Tensor] = {}
        done: set[int] = set()
        wanted = self.targets if only is None else only
        for target in dict.fromkeys(self._originals.get(t, t) for t in wanted):
            maker = self.makers[target]
            if isinstance(maker, str):
                made[target] = params[maker]
            elif id(maker) not in done:  # of DTensors, it may make this rank's targets only
                done.add(id(maker))
                made |= self._convert(maker, params, views)
        made |= {t: made[self._originals[t]] for t in wanted if self._originals.get(t) in made}
        for alias in self.aliases:
            if not alias.flipped and alias.name in params:
                _check_equal(alias, params, views)
        return made

    def __str__(self) -> str:
        lines = []
        for rule in dict.fromkeys(g.rule for g in self.groups):
            mine = [g for g in self.groups if g.rule == rule]
            sources, targets = sum(len(g.sources) for g in mine), sum(len(g.targets) for g in mine)
            size = sum(self.targets[t].nbytes for g in mine for t in g.targets)
            lines.append(f"{sources:>8,} -> {targets:<7,} {human(size):>9}  {short(str(rule))}")
        renamed = {s: t for s, t in self.pairs.items() if s != t}
        kept = len(self.pairs) - len(renamed)
        for source, target in list(renamed.items())[:1]:
            more = f" and {len(renamed) - 1:,} more" if len(renamed) > 1 else ""
            size = sum(self.targets[t].nbytes for t in renamed.values())
            lines.append(
                f"{len(renamed):>8,} -> {len(renamed):<7,} {human(size):>9}  renamed: {source} -> {target}{more}"
            )
        if kept:
            size = sum(self.targets[t].nbytes for s, t in self.pairs.items() if s == t)
            lines.append(f"{kept:>8,} -> {kept:<7,} {human(size):>9}  kept")
        return "\n".join(lines + [f"{len(self.dropped):>8,} dropped"] * bool(self.dropped))

    def _convert(self, group: Group, params: Mapping[str, Tensor], views: bool) -> dict[str, Tensor]:
        sharded = any(is_dtensor(params[n]) for n in group.sources)
        devices = {params[n].device for n in group.sources} if group.rule.stacked else ()
        if len(devices) > 1:
            text = (
                f"{some(group.sources, 3)}: on {', '.join(sorted(map(str, devices)))}, expected one device for a stack"
            )
            raise AdapterError([Problem(text, tuple(group.sources))])
        try:
            return (convert_sharded if sharded else convert)(group, params, views=views)
        except NotAView:
            rule = short(str(group.rule))
            text = f"{some(group.targets)}: only a copy can make it from {some(group.sources, 3)} (rule {rule})"
            raise AdapterError([Problem(text, tuple(group.targets))]) from None


def plan_table(
    entries: tuple[Entry, ...],
    specs: Specs,
    names: Names,
    window: Window,
    local: frozenset[str],
    guards: tuple[bool, bool] = (True, True),
) -> TablePlan:
    """The plan of a table with no open choice. window: ranges to read; local: axes of which sources hold only that.

    guards: whether names that look like an expert's may not just be kept, on the way there and on the way back.
    Raises AdapterError with every problem found.
    """
    claims = claim(entries, names, guard=guards[0])
    problems, groups = claims.problems, []
    for (i, shared), found in claims.groups.items():
        try:
            groups.append(Claimed(claims.rules[i], shared, found, specs, window, local).group())
        except Wrong as wrong:
            problems.append(wrong.problem)
    problems += apart(entries, claims) + unequal(entries, groups)
    targets = {t: spec for group in groups for t, spec in group.target_specs().items()}
    targets |= {t: specs[s] for s, t in claims.pairs.items()}
    if len(targets) < sum(len(group.targets) for group in groups) + len(claims.pairs):
        problems += _collisions(groups, claims.pairs)
    problems += _aliases(claims, specs)
    aliases = tuple(a for a, present in claims.aliases.items() if (a.of in targets if a.flipped else present))
    aliases += back(entries, Names(targets)) if any(isinstance(e, Copies) for e in entries) else ()
    given = [a for a in aliases if a.flipped and a.name in targets]
    problems += [Problem(f"{a.name!r} is there, and is written as an alias of {a.of!r}", (a.name, a.of)) for a in given]
    targets |= {a.name: targets[a.of] for a in aliases if a.flipped}
    made = Names(() if problems else targets)
    problems = problems or way_back(entries, claims, groups, made, guards[1])
    if problems:
        raise AdapterError(dict.fromkeys(problems))
    return TablePlan(specs, tuple(groups), claims.pairs, targets, aliases, tuple(claims.dropped), made)


def _collisions(groups: list[Group], pairs: Mapping[str, str]) -> list[Problem]:
    made: dict[str, str] = {}
    problems = []
    for target, source in chain(
        ((t, next(iter(g.found.values()))) for g in groups for t in g.targets), ((t, s) for s, t in pairs.items())
    ):
        if target in made:
            text = f"two sources for one target: {made[target]!r} and {source!r} both give {target!r}"
            problems.append(Problem(text, (made[target], source, target)))
        made[target] = source
    return problems


def _aliases(claims: Claims, specs: Specs) -> list[Problem]:
    """An alias that is there must stand beside what it is an alias of, and look the same."""
    problems = []
    names = {alias.name: alias for alias in claims.aliases}
    for alias, present in claims.aliases.items():
        if (other := names.get(alias.of)) is not None:
            text = f"{alias.name!r} is an alias of {alias.of!r}, itself an alias: expected of={other.of!r}"
            problems.append(Problem(text, (alias.name, alias.of)))
        if present and not alias.flipped and specs.get(alias.of) != specs[alias.name]:
            original = specs.get(alias.of, "which is missing beside it")
            text = f"{alias.name!r} {specs[alias.name]} is an alias of {alias.of!r} {original}"
            problems.append(Problem(text, (alias.name, alias.of)))
    return problems


def _check_equal(alias: Alias, params: Mapping[str, Tensor], views: bool) -> None:
    here, there = params[alias.name], params[alias.of]
    if views and here is not there:
        text = f"{alias.of!r}: no view of native storage, {alias.name!r} should be the same tensor and is another"
        raise AdapterError([Problem(text, (alias.of, alias.name))])
    same = here is there or here.is_meta or there.is_meta or same_parts(here, there)
    if not same:
        text = f"{alias.name!r} should be the same tensor as {alias.of!r}, and its values differ"
        raise AdapterError([Problem(text, (alias.name, alias.of))])
