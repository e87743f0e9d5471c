"""Names that are copies of one tensor, by a pattern: what all ranks hold alike, the copies that a layer keeps.

    alias("mp_rank_{r:02}.norm", of="mp_rank_00.norm", r=range(1, 4))

A letter of both names indexes the relation; one of the copies' name alone counts them, and is bounded. So a pattern is
as many aliases as there are copies, which the names that are there write out: all of them, or none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from fmoe.layout.entries import Entry
from fmoe.layout.names import Names, hits, patterns
from fmoe.layout.spelled.alias import Alias, Copies
from fmoe.layout.templates import Value
from fmoe.types import Problem


def written(entries: tuple[Entry, ...], names: Names) -> tuple[tuple[Entry, ...], list[Problem]]:
    """Every pattern of copies on its way there, as the aliases that these names speak of.

    Beside them a problem for each pattern of which some copies are there and others not.
    """
    if not any(isinstance(e, Copies) for e in entries):
        return entries, []
    made, problems = list[Entry](), list[Problem]()
    for entry in entries:
        if not isinstance(entry, Copies):
            made.append(entry)
        elif not entry.flipped:
            aliases = list(_aliases(entry, names, both=True))
            here = {a.name for a in aliases if a.name in names}
            made += aliases
            if here and (absent := [a.name for a in aliases if a.name not in here]):
                near = next(a.name for a in aliases if a.name in here)
                told = f"missing {', '.join(map(repr, absent[:8]))}{' and more' * (len(absent) > 8)}"
                problems.append(Problem(f"{told}: a copy like {near!r} ({entry})", (*absent, near)))
    return tuple(made), problems


def back(entries: Iterable[Entry], targets: Names) -> tuple[Alias, ...]:
    """The aliases that patterns of copies, on their way back, make of the names that came out."""
    flipped = [e for e in entries if isinstance(e, Copies) and e.flipped]
    return tuple(replace(a, flipped=True) for e in flipped for a in _aliases(e, targets, both=False))


def _aliases(copies: Copies, names: Names, both: bool) -> Iterator[Alias]:
    """both: also where the copies alone are there, and what they are copies of is not."""
    shared = list(copies.of.captures)
    found: dict[tuple[Value, ...], None] = {}
    for rule in (copies.original, copies.copy)[: 1 + both]:
        for _, hit, rows in hits(rule, names):
            found |= dict.fromkeys(hit.values(shared, rows))
    copy, original = patterns(copies.copy)[0], patterns(copies.original)[0]
    free = {letter: bound for letter, bound in copies.bounds if letter not in shared}
    for values in found:
        at = dict(zip(shared, values, strict=True))
        for place in product(*free.values()):
            yield Alias(copy.render(at | dict(zip(free, place, strict=True))), original.render(at))
