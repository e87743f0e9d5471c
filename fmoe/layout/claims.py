"""Who claims which name: the first half of planning a table, on names alone, in time linear in their number."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from fmoe.folding import fold, listed
from fmoe.layout.entries import Drop, Entry, Keep, rules_of
from fmoe.layout.names import Hit, Names, all_hits, hits, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.proved.suspects import suspicion, watched
from fmoe.layout.spelled.alias import Alias
from fmoe.layout.spelled.copies import written
from fmoe.layout.templates import Rows, Value, template
from fmoe.types import Problem

Shared = tuple[Value, ...]


@dataclass
class Claims:
    """groups: (rule index, shared captures) -> coordinates of stacked captures -> name.

    pairs: name -> its new name; renamed: name -> the rule that renames it, where it is not merely kept.
    """

    rules: list[Rule]
    groups: dict[tuple[int, Shared], dict[tuple[Value, ...], str]] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, Rule] = field(default_factory=dict)
    aliases: dict[Alias, bool] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class Taken(NamedTuple):
    """Who claims what: templates of which one rule claims every name, and names."""

    whole: dict[str, Rule]
    names: dict[str, object]


def claim(entries: tuple[Entry, ...], names: Names, *, guard: bool = True) -> Claims:
    """Every name with the one entry that claims it; what is claimed twice, or by nobody, is a problem.

    guard: so is what looks like an expert's, or like part of a quantised tensor, and is merely kept.
    """
    entries, problems = written(entries, names)
    found = Claims(rules_of(entries), problems=problems)
    taken = Taken({}, {})
    matched = list(all_hits(found.rules, names))
    several = {t for t, n in Counter(at for _, at, _, _ in matched).items() if n > 1}
    if several:
        matched = list(all_hits(found.rules, names, within=several))
    for i, at, hit, rows in matched:
        rule = found.rules[i]
        if at not in several and len(rows.names) == len(names.rows[at].names):
            taken.whole[at] = rule
        else:
            _own(found, taken, at, rows.names, rule)
        if rule.source.axes is None:
            _rename(found, rule, hit, rows)
        else:
            _gather(found, i, hit, rows)
    for entry in entries:
        if isinstance(entry, Alias):
            found.aliases[entry] = entry.name in names
            there = found.aliases[entry] and not entry.flipped
            _own(found, taken, template(entry.name), [entry.name] if there else [], entry)
        elif isinstance(entry, Drop) and not entry.flipped:
            gone = [(at, rows.names) for at, _, rows in hits(entry.rule, names)]
            for at, mine in gone:
                _own(found, taken, at, mine, entry)
            dropped = [n for _, mine in gone for n in mine]
            if entry.refused and dropped:
                text = f"{some(dropped)}: {entry.because}; lossy=True leaves it out"
                found.problems.append(Problem(text, tuple(dropped)))
            found.dropped += dropped
    _keep(found, entries, names, taken, guard)
    return found


def _own(found: Claims, taken: Taken, at: str, names: list[str], entry: object) -> None:
    for name in names:
        if (other := taken.names.get(name, taken.whole.get(at))) is not None:
            found.problems.append(Problem(f"{name!r} is claimed twice: by {other} and by {entry}", (name,)))
    taken.names.update(dict.fromkeys(names, entry))


def _rename(found: Claims, rule: Rule, hit: Hit, rows: Rows) -> None:
    target, shared = patterns(rule)[1], rule.shared
    for name, values in zip(rows.names, hit.values(shared, rows), strict=True):
        found.pairs[name] = target.render(dict(zip(shared, values, strict=True)))
        found.renamed[name] = rule


def _gather(found: Claims, i: int, hit: Hit, rows: Rows) -> None:
    rule = found.rules[i]
    known: dict[tuple[Value, ...], tuple[Value, ...]] = {}  # all layers have the same places: one tuple for each
    places, start = [known.setdefault(at, at) for at in hit.values(rule.stacked, rows)], 0
    for shared, run in groupby(hit.values(rule.shared, rows)):  # of one layer, names mostly follow each other
        end = start + len(list(run))
        found.groups.setdefault((i, shared), {}).update(zip(places[start:end], rows.names[start:end], strict=True))
        start = end


def _keep(found: Claims, entries: tuple[Entry, ...], names: Names, taken: Taken, guard: bool) -> None:
    """Pass on what is left, if a keep says so and it does not look like something that a rule should have claimed."""
    free = [rows.names for at, rows in names.rows.items() if at not in taken.whole]
    left = Names([name for same in free for name in same if name not in taken.names])
    keeps = [entry for entry in entries if isinstance(entry, Keep)]
    fits = {at: dict[int, list[str]]() for at in left.rows}  # of each template, the names that each keep fits
    for i, at, _, rows in all_hits([keep.rule for keep in keeps], left):
        fits[at][i] = rows.names
    watch = watched(entries) if guard and left.rows else None
    for at, rows in left.rows.items():
        for which, same in _alike(fits[at], rows.names):
            mine = tuple(keeps[i] for i in which)
            why = 'no rule claims it. Fix: add a rule for it, or | keep("{rest}")' if not mine else None
            if mine and watch is not None and not any(k.sure for k in mine):
                why = suspicion(at, watch, mine, names.rows)
            if why:
                found.problems.append(Problem(f"{some(same)}: {why}", tuple(same)))
            else:
                found.pairs.update(zip(same, same, strict=True))


def _alike(fits: dict[int, list[str]], names: list[str]) -> list[tuple[tuple[int, ...], list[str]]]:
    """Names apart by who fits them: mostly each fits them all."""
    if all(len(fitting) == len(names) for fitting in fits.values()):
        return [(tuple(fits), names)]
    who: dict[str, tuple[int, ...]] = {}
    for i, fitting in fits.items():
        who |= {n: (*who.get(n, ()), i) for n in fitting}
    found: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        found.setdefault(who.get(name, ()), []).append(name)
    return list(found.items())


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are; of a great many, what they have in common."""
    return listed(names, most) if len(names) <= 2 * most or most < 8 else fold(names)
