"""Who claims which name: the first half of planning a table, on names alone, in time linear in their number."""

import re
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from fmoe.layout.entries import Alias, Drop, Entry, Keep, rules_of, walk
from fmoe.layout.names import Hit, Names, Numbers, Pattern, Row, Value, hits, patterns
from fmoe.layout.notation import Address, Capture, Rule
from fmoe.types import EXPERT_TENSORS, Problem

Shared = tuple[Value, ...]
_EXPERT = re.compile(r"(local_)?experts?([_\d].*)?")  # a segment of a name that experts stand under
_STACKED = re.compile(
    r"(^|\.)((block_sparse_)?moe\.(gate|up|down)_proj|(block_sparse_moe|mlp)\.(in|out)put_linear)\."
)  # experts in one tensor, under no such segment
_QUANTISED = re.compile(
    r"(_scale_inv|weight_scale(_2)?|(input|activation)_scale|weight_packed|qscale_\w+|\.(qweight|qzeros|absmax))$"
)
_PAIRED = {"_blocks": "_scales", "_scales": "_blocks"}  # MXFP4 in two tensors; one alone has an ordinary name


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
            _return(found, rule, hit, rows[0])
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
    _keep(found, entries, names, owner)
    return found


def _own(found: Claims, owner: dict[str, object], names: list[str], entry: object) -> None:
    twice = [n for n in names if n in owner] if owner and not owner.keys().isdisjoint(names) else []
    for name in twice:
        found.problems.append(Problem(f"{name!r} is claimed twice: by {owner[name]} and by {entry}", (name,)))
    owner.update(dict.fromkeys(names, entry))


def _return(found: Claims, rule: Rule, hit: Hit, row: Row) -> None:
    """What a row becomes must be this rule's alone on the way back, and mean the same: so for all of its template."""
    there, shared = patterns(rule)[1], hit.values(rule.shared, row[1])
    first: dict[str, Value] = {n: 0 for n in rule.unstacked}
    target = there.render(first | dict(zip(rule.shared, shared, strict=True)))
    back = Names([target])
    rivals = [r for r in found.rules if r != rule and any(hits(r.inverse, back, within=back.rows))]
    if [h.values(rule.shared, rows[0][1]) for _, h, rows in hits(rule.inverse, back)] != [shared]:
        rivals = [rule]
    for rival in rivals:
        why = "does not claim" if rival is rule else "would claim too"
        text = f"{row[0]!r} would become {target!r}, which on the way back {rival} {why}"
        found.problems.append(Problem(text + f" (rule {rule})" * (rival is not rule), (row[0],)))


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
    left = Names([name for name in names.names if name not in owner])
    fits: dict[str, tuple[Keep, ...]] = {}
    for entry in entries:
        if isinstance(entry, Keep):
            fits |= {n: (*fits.get(n, ()), entry) for _, _, rows in hits(entry.rule, left) for n, _ in rows}
    layouts = [e for e in walk(entries) if isinstance(e, Rule) and e.source.axes]
    regions = [region for rule in layouts for region in _region(rule)]
    back: list[tuple[Rule, object]] = [(r, r) for r in rules_of([e.inverse for e in entries])]
    back += [(e.rule, e) for e in entries if isinstance(e, Drop) and e.flipped]
    for template, rows in left.rows.items():
        alike: dict[tuple[Keep, ...], list[str]] = {}
        for name, _ in rows:
            alike.setdefault(fits.get(name, ()), []).append(name)
        for keeps, same in alike.items():
            why = "no rule claims it" if not keeps else None
            if keeps and layouts and not any(k.sure for k in keeps):
                why = _suspicious(template, regions, keeps, names.rows)
            mine = Names(same)
            if keeps and not why and (taken := next((e for r, e in back if any(hits(r, mine))), None)):
                why = f"it would be kept, but the way back would claim it for {taken}"
            if why:
                rivals = [s for s, t in found.pairs.items() if t in same]
                found.problems.append(Problem(f"{some([*same, *rivals])}: {why}", (*same, *rivals)))
            else:
                found.pairs.update(zip(same, same, strict=True))


def _suspicious(
    template: str, regions: list[tuple[str, Pattern]], keeps: tuple[Keep, ...], there: Container[str]
) -> str | None:
    """Why a keep that does not spell it out may not pass this name on. there: the templates of all names."""
    end = next((end for end in _PAIRED if template.endswith(end)), None)
    packed = _QUANTISED.search(template) or end and template.removesuffix(end) + _PAIRED[end] in there
    if packed and not any(_QUANTISED.search(k.spelled) or end and k.spelled.endswith(end) for k in keeps):
        return "no rule claims it, and it is part of a quantised tensor, which would be lost or misread without it"
    spelled = {segment for k in keeps for segment in k.spelled.split(".")}
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


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(repr(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
