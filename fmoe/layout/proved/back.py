"""The way back, planned: every target is claimed by what made it, at the same place, and can be split as it was merged.

A rule is a bijection of axes, not of texts: `a.{l}.{k}` and `b{l}{k}` relate (1, 11) and (11, 1) to one name. So the
names that come out are claimed again, by the inverse entries, and compared one by one.
"""

from collections.abc import Iterator, Mapping, Sequence

from fmoe.folding import short
from fmoe.layout.axes import Group
from fmoe.layout.claims import Claims, claim, some
from fmoe.layout.entries import Drop, Entry, rules_of
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Atom
from fmoe.types import Problem

Maker = tuple[Rule | None, tuple[str, ...]]


def way_back(
    entries: tuple[Entry, ...], claims: Claims, groups: Sequence[Group], targets: Names, guard: bool
) -> list[Problem]:
    """Why `inverse` would not give back the names and sizes that went in, for every target. Empty: it would."""
    lost = list(_unsplit(groups)) + list(_vanished(groups))
    inverse = tuple(e.inverse for e in entries)
    back = claim(inverse, targets, guard=guard)
    known: dict[tuple, tuple] = {}
    made = {_key(i, group): _coordinates(group, known) for (i, _), group in zip(claims.groups, groups, strict=True)}
    pairs = {t: s for s, t in claims.pairs.items()}
    if (
        not back.problems
        and not back.dropped
        and back.pairs == pairs
        and back.groups == {k: v for k, v in made.items() if v}
    ):
        return lost
    here = {name: (key, at) for key, found in made.items() for at, name in found.items()}
    there = {name: (key, at) for key, found in back.groups.items() for at, name in found.items()}
    bad = {key for problem in back.problems for key in problem.keys} | set(back.dropped)
    wrong = [t for t in here if t in bad or there.get(t) != here[t]]
    wrong += [t for t in pairs if t in bad or back.pairs.get(t) != pairs[t]]
    makers: dict[str, Maker] = {t: (g.rule, tuple(g.found.values())) for g in groups for t in g.targets}
    makers |= {t: (claims.renamed.get(s), (s,)) for t, s in pairs.items()}
    why = {key: problem.text for problem in back.problems for key in problem.keys}
    return lost + list(_explained(inverse, wrong, makers, why))


def _key(i: int, group: Group) -> tuple[int, tuple]:
    return i, tuple(group.shared[n] for n in group.rule.inverse.shared)


def _coordinates(group: Group, known: dict[tuple, tuple]) -> dict[tuple, str]:
    """Each target by its place. known: the places of all groups, which are mostly the same."""
    places = (known.setdefault(at, at) for at in group.grid(group.rule.unstacked))
    return dict(zip(places, group.targets, strict=True))


def _explained(
    inverse: tuple[Entry, ...], wrong: list[str], makers: Mapping[str, Maker], why: Mapping[str, str]
) -> Iterator[Problem]:
    """One problem for each wrong target: who would take it on the way back, or that nobody would."""
    names = Names(wrong)
    takers: dict[str, list[object]] = {}
    for back in rules_of(inverse):
        for _, _, rows in hits(back, names, within=names.rows):
            for name in rows.names:
                takers.setdefault(name, []).append(back.inverse)
    for entry in inverse:
        for _, _, rows in hits(entry.rule, names) if isinstance(entry, Drop) and not entry.flipped else ():
            for name in rows.names:
                takers.setdefault(name, []).append(entry.inverse)
    for target in wrong:
        rule, sources = makers[target]
        rivals = [t for t in takers.get(target, []) if t != rule]
        if rule is None and rivals:
            text = f"{target!r}: it would be kept, but the way back would claim it for {rivals[0]}"
        elif rule is None:
            text = f"{target!r} would be kept, but not on the way back: {why.get(target, 'it is another tensor there')}"
        else:
            does = f"{rivals[0]} would claim too (rule {short(str(rule))})" if rivals else f"{rule} does not claim"
            if not rivals and rule in takers.get(target, []):
                does = f"{rule} would read as another name"
            text = f"{some(sources, 1)} would become {target!r}, which on the way back {does}"
        yield Problem(text, sources)


def _unsplit(groups: Sequence[Group]) -> Iterator[Problem]:
    """Dimensions of targets that merge two or more axes whose sizes the way back cannot know."""
    for rule in dict.fromkeys(g.rule for g in groups):
        if letters := unsplit(rule):
            keys = tuple(name for g in groups if g.rule == rule for name in g.found.values())
            yield Problem(f"{some(keys)}: {_bind(letters)} (rule {short(str(rule))})", keys)


def loose_parts(rule: Rule) -> str | None:
    """Why a ragged axis of the rule cannot be split again, if two or more of its parts are of unknown length."""
    for atom in rule.ragged:
        if len(parts := [label for label in atom.split("|") if label not in rule.bound]) > 1:
            return f"rule {rule}: {_bind(parts)}"
    return None


def _bind(letters: Sequence[str]) -> str:
    told = f"bind {', '.join(letters)}, or all but one of them, as in rule(..., {letters[0]}=8)"
    return f"the way back cannot know how long {', '.join(letters)} are: {told}"


def unsplit(rule: Rule) -> tuple[Atom, ...]:
    """The letters of a target dimension that the way back cannot tell apart; none: empty.

    It knows what is bound, the number of choices, and what target names count; of the rest, one a dimension.
    """
    captures = {**rule.source.captures, **rule.target.captures}
    counted = {*rule.bound, *rule.unstacked, *(n for n, c in captures.items() if c.choices)}
    for dim in rule.target.axes or ():
        loose: list[Atom] = []
        for atom in (a for a in dim if a != "1"):
            parts = [label for label in atom.split("|") if label not in rule.bound] if "|" in atom else []
            if len(parts) > 1:
                return tuple(parts)
            whole = next((ragged for ragged, p in rule.ragged.items() if p == atom), "")
            open_ = any(label not in rule.bound for label in whole.split("|")) if whole else atom not in counted
            loose += parts if "|" in atom else [atom] * open_
        if len(loose) > 1:
            return tuple(loose)
    return ()


def _vanished(groups: Sequence[Group]) -> Iterator[Problem]:
    """Sources of which no target is made, where no range was asked for: a stack of no experts, one by one."""
    for group in groups:
        if not group.targets and not group.window:
            empty = ", ".join(n for n in group.rule.unstacked if not group.sizes[n])
            names = tuple(group.found.values())
            yield Problem(
                f"{some(names)}: nothing would come out, since {empty} is 0 (rule {short(str(group.rule))})", names
            )
