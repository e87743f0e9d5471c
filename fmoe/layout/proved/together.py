"""Rules that come together: a layer that has one has all, and a letter has one size in all layers of one tower."""

from collections import Counter
from dataclasses import replace

from fmoe.layout.axes import Group
from fmoe.layout.claims import Claims, some
from fmoe.layout.entries import Entry, Together
from fmoe.layout.names import patterns
from fmoe.layout.notation import Rule
from fmoe.layout.templates import Value, template
from fmoe.types import Problem


def apart(entries: tuple[Entry, ...], claims: Claims) -> list[Problem]:
    """Rules that come together: a layer that has one must have all."""
    problems = []
    for entry in entries:
        if not isinstance(entry, Together) or entry.flipped:
            continue
        mine = [i for i, rule in enumerate(claims.rules) if rule in entry.rules]
        there = {i: {_place(claims.rules[i], key): key for j, key in claims.groups if j == i} for i in mine}
        anywhere = {place: None for places in there.values() for place in places}
        for i in mine:
            for place in (place for place in anywhere if place not in there[i]):
                rule, beside = claims.rules[i], next(j for j in mine if place in there[j])
                absent = patterns(rule)[0].render(_open(rule) | dict(place))
                near = next(iter(claims.groups[beside, there[beside][place]].values()))
                text = f"missing {absent!r}, which must stand beside {near!r}. Fix: give both"
                problems.append(Problem(text, (absent, near)))
    return problems


def _place(rule: Rule, key: tuple[Value, ...]) -> tuple[tuple[str, Value], ...]:
    """What a group is of, whatever the order in which its rule's name has the captures."""
    return tuple(sorted(zip(rule.shared, key, strict=True)))


def unequal(entries: tuple[Entry, ...], groups: list[Group]) -> list[Problem]:
    """Rules that come together, in all layers of one tower: a letter has one size throughout.

    One that a single rule has, as that of several codes an element, has one in all layers of one dtype.
    """
    bundled = {rule for entry in entries if isinstance(entry, Together) for rule in entry.rules}
    one_each = {group.rule: group for group in groups if group.rule in bundled}.values()
    rules_with = Counter(letter for group in one_each for letter in group.sizes)
    towers: dict[tuple[str, Value, str], list[Group]] = {}
    for group in groups:
        if group.rule in bundled:
            tower = _tower(group)
            for letter in group.sizes:
                alone = str(group.dtype) if rules_with[letter] == 1 else ""
                towers.setdefault((letter, tower, alone), []).append(group)
    problems = []
    for (letter, *_), having in sorted(towers.items()):
        usual = Counter(group.sizes[letter] for group in having).most_common(1)[0][0]
        for group in having:
            if (size := group.sizes[letter]) != usual:
                near = next(g for g in having if g.sizes[letter] == usual)
                absent = _absent(group, letter, min(size, usual)) if size < usual else _absent(near, letter, usual)
                text = f"{some(group.sources, 3)}: {letter} is {size}, but {usual} at {some(near.sources, 1)}"
                text += f"; missing {some(absent)}" if absent else ""
                problems.append(Problem(text, (*group.sources, *absent)))
    return problems


def _tower(group: Group) -> str:
    """The text that indexes a group, such as its prefix, with blanks for numbers: `thinker.` and `talker.` differ."""
    captures = group.rule.source.captures
    text = {n: v for n, v in group.shared.items() if not group.rule.indexed(n)}
    said = (captures[n].choices[int(v)] if captures[n].choices else str(v) for n, v in text.items())
    return template(" ".join(said))


def _absent(group: Group, letter: str, size: int) -> list[str]:
    """The names that a stack would need to be longer by one along a letter that its names count."""
    if letter not in group.rule.stacked:
        return []
    longer = replace(group, sizes=group.sizes | {letter: size + 1}, window={letter: range(size, size + 1)})
    grid = [dict[str, Value](zip(group.stacked, at, strict=True)) for at in longer.grid(group.stacked)]
    return [patterns(group.rule)[0].render(group.shared | at) for at in grid]


def _open(rule: Rule) -> dict[str, Value]:
    """The first coordinates of what a rule stacks: enough to spell an example."""
    return {n: 0 for n in rule.source.captures}
