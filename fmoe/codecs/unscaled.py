"""What a plan of quantised tensors refuses: integers that no scale explains, and ranges that would cut blocks."""

from collections.abc import Collection, Mapping

from fmoe.codecs.parts import Parts
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule
from fmoe.types import EXPERT_TENSORS, Problem


def weight_rules(rules: list[Rule]) -> tuple[Rule, ...]:
    """The rules that make expert weights and biases."""
    return tuple(r for r in rules if r.target.name.rpartition(".")[2] in EXPERT_TENSORS)


def unscaled(specs: Specs, found: Mapping[str, Parts], rules: tuple[Rule, ...]) -> list[Problem]:
    """A problem for each tensor of experts that is neither floating nor a part of a quantised one."""
    parts = {n for p in found.values() for n in (p.name, *p.stored)}
    odd = [n for n, s in specs.items() if n not in parts and not s.dtype.is_floating_point and not s.dtype.is_complex]
    if not odd:
        return []
    names = Names(odd)
    named = dict.fromkeys(n for rule in rules for _, _, rows in hits(rule, names) for n, _ in rows)
    text = "{!r} is {}, and no scale beside it says what its numbers mean: expected a floating dtype, or its scales"
    return [Problem(text.format(n, str(specs[n].dtype).removeprefix("torch.")), (n,)) for n in named]


def cut_across(found: Collection[str], window: Window) -> list[Problem]:
    """A problem where a range is asked of another axis than that of experts."""
    others = window.keys() - {"e"} if found else set()
    text = f"{', '.join(sorted(others))}: quantised blocks can only be cut by expert"
    return [Problem(text, tuple(found)[:8])] * bool(others)
