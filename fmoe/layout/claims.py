"""Who claims which name: the first half of planning a table, on names alone, in time linear in their number."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fmoe.folding import fold, listed
from fmoe.layout.entries import Alias, Drop, Entry, Keep, rules_of
from fmoe.layout.names import Hit, Names, Numbers, Row, Value, hits, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.proved.suspects import suspicion, watched
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


def claim(entries: tuple[Entry, ...], names: Names, *, guard: bool = True) -> Claims:
    """Every name with the one entry that claims it; what is claimed twice, or by nobody, is a problem.

    guard: so is what looks like an expert's, or like part of a quantised tensor, and is merely kept.
    """
    found = Claims(rules_of(entries))
    owner: dict[str, object] = {}
    matched = [(i, template) for i, rule in enumerate(found.rules) for template, _, _ in hits(rule, names)]
    several = {t for t, n in Counter(template for _, template in matched).items() if n > 1}
    for i, rule in enumerate(found.rules):
        for _, hit, rows in hits(rule, names, within=several):
            _own(found, owner, [r[0] for r in rows], rule)
            if rule.source.axes is None:
                _rename(found, rule, hit, rows)
            else:
                _gather(found, i, hit, rows)
    present = set(names.names)
    for entry in entries:
        if isinstance(entry, Alias):
            found.aliases[entry] = entry.name in present
            _own(found, owner, [entry.name] if entry.name in present and not entry.flipped else [], entry)
        elif isinstance(entry, Drop) and not entry.flipped:
            dropped = [r[0] for _, _, rows in hits(entry.rule, names) for r in rows]
            _own(found, owner, dropped, entry)
            if entry.refused and dropped:
                text = f"{some(dropped)}: {entry.because}; lossy=True leaves it out"
                found.problems.append(Problem(text, tuple(dropped)))
            found.dropped += dropped
    _keep(found, entries, names, owner, guard)
    return found


def _own(found: Claims, owner: dict[str, object], names: list[str], entry: object) -> None:
    twice = [n for n in names if n in owner] if owner and not owner.keys().isdisjoint(names) else []
    for name in twice:
        found.problems.append(Problem(f"{name!r} is claimed twice: by {owner[name]} and by {entry}", (name,)))
    owner.update(dict.fromkeys(names, entry))


def _rename(found: Claims, rule: Rule, hit: Hit, rows: list[Row]) -> None:
    target, shared = patterns(rule)[1], rule.shared
    for name, numbers in rows:
        found.pairs[name] = target.render(dict(zip(shared, hit.values(shared, numbers), strict=True)))
        found.renamed[name] = rule


def _gather(found: Claims, i: int, hit: Hit, rows: list[Row]) -> None:
    rule = found.rules[i]
    shared, stacked = _reader(hit, rule.shared), _reader(hit, rule.stacked)
    for name, numbers in rows:
        found.groups.setdefault((i, shared(numbers)), {})[stacked(numbers)] = name


def _reader(hit: Hit, names: tuple[str, ...]) -> Callable[[Numbers], tuple[Value, ...]]:
    """`hit.values(names, .)`, quicker where one value at most varies: this runs once for every key."""
    values = [hit.readers[n] for n in names]
    varying = [i for i, v in enumerate(values) if callable(v)]
    if len(varying) != 1:
        return lambda numbers: hit.values(names, numbers)
    before, read, after = tuple(values[: varying[0]]), values[varying[0]], tuple(values[varying[0] + 1 :])
    return lambda numbers: (*before, read(numbers), *after)  # type: ignore[operator,arg-type]


def _keep(found: Claims, entries: tuple[Entry, ...], names: Names, owner: dict[str, object], guard: bool) -> None:
    """Pass on what is left, if a keep says so and it does not look like something that a rule should have claimed."""
    left = Names([name for name in names.names if name not in owner])
    fits: dict[str, tuple[Keep, ...]] = {}
    for entry in entries:
        if isinstance(entry, Keep):
            fits |= {n: (*fits.get(n, ()), entry) for _, _, rows in hits(entry.rule, left) for n, _ in rows}
    watch = watched(entries) if guard else None
    for template, rows in left.rows.items():
        alike: dict[tuple[Keep, ...], list[str]] = {}
        for name, _ in rows:
            alike.setdefault(fits.get(name, ()), []).append(name)
        for keeps, same in alike.items():
            why = 'no rule claims it. Fix: add a rule for it, or | keep("{rest}")' if not keeps else None
            if keeps and watch is not None and not any(k.sure for k in keeps):
                why = suspicion(template, watch, keeps, names.rows)
            if why:
                found.problems.append(Problem(f"{some(same)}: {why}", tuple(same)))
            else:
                found.pairs.update(zip(same, same, strict=True))


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are; of a great many, what they have in common."""
    return listed(names, most) if len(names) <= 2 * most or most < 8 else fold(names)
