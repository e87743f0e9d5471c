"""Who claims which name: the first half of planning a table, on names alone, in time linear in their number."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fmoe.entries import Alias, Drop, Entry, Keep, rules_of, walk
from fmoe.names import Hit, Names, Numbers, Pattern, Row, Value, hits, patterns
from fmoe.rules import Address, Capture, Rule
from fmoe.types import EXPERT_TENSORS, Problem

Shared = tuple[Value, ...]
_EXPERT = re.compile(r"(local_)?experts?([_\d].*)?")  # a segment of a name that experts stand under
_STACKED = re.compile(
    r"(^|\.)(block_sparse_)?moe\.(gate|up|down)_proj\."
)  # experts in one tensor, under no such segment
_QUANTISED = re.compile(
    r"(_scale_inv|weight_scale(_2)?|(input|activation)_scale|_blocks|_scales|weight_packed|qscale_\w+)$"
)


@dataclass
class Claims:
    """groups: (rule index, shared captures) -> coordinates of stacked captures -> name. pairs: name -> its new name."""

    rules: list[Rule]
    groups: dict[tuple[int, Shared], dict[tuple[Value, ...], str]] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    aliases: dict[Alias, bool] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def claim(entries: tuple[Entry, ...], names: Names) -> Claims:
    """Every name with the one entry that claims it; what is claimed twice, or by nobody, is a problem."""
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
            rows = [r for t, rows in names.rows.items() if _simple(entry.pattern).match(t) for r in rows]
            _own(found, owner, [r[0] for r in rows], entry)
            found.dropped += [r[0] for r in rows]
    _keep(found, entries, names, owner)
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


def _keep(found: Claims, entries: tuple[Entry, ...], names: Names, owner: dict[str, object]) -> None:
    """Pass on what is left, if a keep says so and it does not look like something that a rule should have claimed."""
    keeps = [e for e in entries if isinstance(e, Keep)]
    layouts = [e for e in walk(entries) if isinstance(e, Rule) and e.source.axes]
    regions = [region for rule in layouts for region in _region(rule)]
    back = rules_of([e.inverse for e in entries])
    for template, rows in names.rows.items():
        left = [name for name, _ in rows if name not in owner]
        if not left:
            continue
        fits = [k.pattern.name for k in keeps if _simple(k.pattern).match(template)]
        why = "no rule claims it" if not fits else None
        if fits and layouts:
            why = _suspicious(template, regions, fits)
        mine = Names(left)
        if fits and not why and (taken := next((r for r in back if any(hits(r, mine))), None)):
            why = f"it would be kept, but the way back would claim it for {taken}"
        if why:
            rivals = [s for s, t in found.pairs.items() if t in left]
            found.problems.append(Problem(f"{some([*left, *rivals])}: {why}", (*left, *rivals)))
        else:
            found.pairs.update(zip(left, left, strict=True))


def _suspicious(template: str, regions: list[tuple[str, Pattern]], keeps: list[str]) -> str | None:
    """Why a keep that does not spell it out may not pass this name on."""
    if _QUANTISED.search(template) and not any(_QUANTISED.search(k) for k in keeps):
        return "no rule claims it, and it is part of a quantised tensor, which would be lost or misread without it"
    spelled = {segment for k in keeps for segment in k.split(".")}
    near = {segment for segment in template.split(".") if _EXPERT.fullmatch(segment)}
    near |= {word for word, region in regions if region.match(template)}
    if template.rpartition(".")[2] in EXPERT_TENSORS or _STACKED.search(template) or near and not near <= spelled:
        return "no rule claims it, and it looks like an expert's"
    return None


def _region(rule: Rule) -> list[tuple[str, Pattern]]:
    """Names that begin as the rule's do, up to the segment with the first capture that counts experts or halves.

    With the last literal word of that beginning: a keep that spells it may keep such names.
    """
    parts: list[str | Capture] = []
    for part in rule.source.parts:
        if isinstance(part, Capture) and part.name in rule.stacked and (part.choices or part.name == "e"):
            break
        parts.append(part)
    else:
        return []
    while parts and not (isinstance(parts[-1], str) and "." in parts[-1]):
        parts.pop()
    if not parts:
        return []
    stem = str(parts[-1]).rpartition(".")[0]
    word = stem.rpartition(".")[2]
    return (
        [(word, Pattern(Address((*parts[:-1], stem + ".", Capture("rest"))), patterns(rule)[0].indexed))]
        if word
        else []
    )


@lru_cache(maxsize=4096)
def _simple(address: Address) -> Pattern:
    """A keep's or drop's pattern: single letters are numbers, words are text."""
    return Pattern(address, frozenset(n for n in address.captures if len(n) == 1))


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
