"""What a plan of quantised tensors refuses: integers without scales, ranges that cut blocks, experts left plain."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from fmoe.codecs.format import Format
from fmoe.codecs.parts import Parts
from fmoe.codecs.scales import matrix
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule
from fmoe.types import EXPERT_TENSORS, Problem


def weight_rules(rules: list[Rule]) -> tuple[Rule, ...]:
    """The rules that make expert weights and biases."""
    return tuple(r for r in rules if r.target.name.rpartition(".")[2] in EXPERT_TENSORS)


def unscaled(
    specs: Specs, found: Mapping[str, Parts], rules: tuple[Rule, ...], told: Collection[str] = ()
) -> list[Problem]:
    """A problem for each weight, bias and tensor of experts that is neither floating nor a part of a quantised one.

    rules: of expert weights, which have names of any kind. told: the names of which a problem says so already.
    """
    whole = {d for d in {spec.dtype for spec in specs.values()} if not d.is_floating_point}
    parts = {*told, *(n for p in found.values() for n in (p.name, *p.stored))} if whole else set()
    odd = [n for n, spec in specs.items() if spec.dtype in whole and n not in parts]
    if not odd:
        return []
    names = Names(odd)
    named = dict.fromkeys(n for rule in rules for _, _, rows in hits(rule, names) for n in rows.names)
    named |= dict.fromkeys(n for n in odd if n.endswith((".weight", ".bias")))
    text = "{!r} is {}, and no scale beside it says what its numbers mean: expected a floating dtype, or its scales"
    return [Problem(text.format(n, str(specs[n].dtype).removeprefix("torch.")), (n,)) for n in named]


def with_rules(specs: Specs, rules: tuple[Rule, ...]) -> list[str]:
    """The names, but for those of experts whose scales no rule would claim: of another tower, or beyond the bound."""
    mine, experts = [r for r in rules if matrix(r)], Names([n for n in specs if "experts" in n.split(".")])
    within = {n for r in mine for _, _, rows in hits(r, experts, within=experts.rows) for n in rows.names}
    left = {*experts.names} - within if mine else set()
    return [n for n in specs if n not in left]


def cut_across(found: Collection[str], window: Window) -> list[Problem]:
    """A problem where a range is asked of another axis than that of experts."""
    others = window.keys() - {"e"} if found else set()
    text = f"{', '.join(sorted(others))}: quantised blocks can only be cut by expert"
    return [Problem(text, tuple(found)[:8])] * bool(others)


def left_plain(specs: Specs, done: Collection[str], written: Sequence[tuple[Format, str]]) -> Iterator[Problem]:
    """A problem for experts that an export would leave plain among quantised ones. written: formats, and for which."""
    told = ", ".join(f.name for f, _ in written)
    left = {n: s.shape for n, s in specs.items() if n not in done and "experts" in n.split(".")}
    named = {n: s for n, s in left.items() if len(s) in (2, 3) and any(re.fullmatch(p, n) for _, p in written)}
    ragged = tuple(n for n, s in named.items() if not any(_in_groups(f, s) for f, _ in written))
    if ragged:
        wide = " or ".join(str(f.along.block[1]) for f, _ in written if f.along.grouped_by_row)
        found = f"{some(ragged)}: {list(left[ragged[0]])} cannot be written in {told}"
        fix = "Fix: choose another format; blocks of fp8 may be of any size"
        yield Problem(f"{found}, expected whole groups of {wide} columns. {fix}", ragged)
    if fused := tuple(n for n, s in left.items() if len(s) == 3 and n not in ragged):
        fix = "choose layout='per_expert' to quantise, where the family has it, or another format"
        yield Problem(f"{some(fused)}: fused experts have no form in {told}: {fix}", fused)


def _in_groups(f: Format, shape: tuple[int, ...]) -> bool:
    """Whether rows are whole groups, if the format has any."""
    return not f.along.grouped_by_row or f.as_stored(shape)[-2 if f.across else -1] % f.along.block[1] == 0
