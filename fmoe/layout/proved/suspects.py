"""The guard: `{rest}` alone does not keep a name that looks like an expert's, or like part of a quantised tensor.

A keep that spells such a name keeps it: its text before or between captures, or the segment that looks so.
"""

import re
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from fmoe.layout.entries import Entry, Keep, walk
from fmoe.layout.names import Pattern, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address, Capture
from fmoe.layout.spelled.parsing import parse
from fmoe.layout.templates import BLANK
from fmoe.types import EXPERT_TENSORS, AdapterError

_EXPERT = re.compile(r"(local_)?experts?([_\d].*)?")  # a segment of a name that experts stand under
_STACKED = re.compile(
    r"(^|\.)((block_sparse_)?moe\.(gate|up|down)_proj|(block_sparse_moe|mlp)\.(in|out)put_linear)\."
)  # experts in one tensor, under no such segment
_FUSED = re.compile(r"(^|\.)experts\.(gate_up_proj|down_proj)(_bias)?$")
QUANTISED = re.compile(
    r"(_scale_inv|weight_scale(_2)?|(input|activation)_scale|weight_packed|qscale_\w+|\.(qweight|qzeros|absmax))$"
)
_ODD = re.compile(r'[\s\0-\x1f\x7f"\\{}\[\]\uD800-\uF8FF]+')  # blanks of templates are among them
_PAIRED = {"_blocks": "_scales", "_scales": "_blocks"}  # MXFP4 in two tensors; one alone has an ordinary name


class Region(NamedTuple):
    """Names that begin as an expert rule's do; word: the last literal segment of that beginning."""

    word: str
    pattern: Pattern


def watched(entries: Iterable[Entry]) -> list[Region] | None:
    """The regions of a table's expert rules; None where no rule has axes: then nothing is suspicious."""
    layouts = [e for e in walk(entries) if isinstance(e, Rule) and e.source.axes]
    return [region for rule in layouts if of_experts(rule) for region in _region(rule)] if layouts else None


@lru_cache(maxsize=4096)
def of_experts(rule: Rule) -> bool:
    """Whether a rule relates experts' tensors: it has the letter e, or a name of its has a segment like an expert's."""
    text = [p if isinstance(p, str) else "" for side in (rule.source, rule.target) for p in side.parts]
    return bool(rule.source.axes) and ("e" in rule.letters or any(map(_like, ".".join(text).split("."))))


def _like(segment: str) -> bool:
    return bool(_EXPERT.fullmatch(segment)) or segment in EXPERT_TENSORS


class _Looks(NamedTuple):
    """alike: the words of a template that make it look like an expert's. end: that of one part of two, if it has it."""

    alike: tuple[str, ...]
    quantised: bool
    end: str | None


@lru_cache(maxsize=1 << 14)
def _looks(template: str) -> _Looks:
    """What a template's text says, whoever keeps it. Plans of one family ask the same again and again."""
    alike = [s for s in template.split(".") if _like(s)]
    if found := _STACKED.search(template):
        alike.append(found[2].partition(".")[0])
    end = next((end for end in _PAIRED if template.endswith(end)), None)
    return _Looks(tuple(alike), bool(QUANTISED.search(template)), end)


def suspicion(template: str, regions: list[Region], keeps: tuple[Keep, ...], there: Container[str]) -> str | None:
    """Why these keeps may not pass this name on, and the line to add. there: the templates of all names."""
    alike, quantised, end = _looks(template)
    packed = quantised or end and template.removesuffix(end) + _PAIRED[end] in there
    segments = template.split(".")
    near = dict.fromkeys(alike)
    near |= {region.word: None for region in regions if _begins(region.pattern, template)}
    parts = lambda k: k.spells or bool(QUANTISED.search(k.spelled)) or bool(end) and k.spelled.endswith(end)
    named = lambda k: not near or k.spells or near.keys() <= set(k.spelled.split("."))
    if packed and not any(map(parts, keeps)):
        why = "no rule claims it, and it is part of a quantised tensor, which would be lost or misread without it"
        line = "{rest}." * (len(segments) > 1) + _numbered(segments[-1])
        add = _added(line, template, lambda k: parts(k) and named(k))
        return f"{why}. Fix: choose the family that decodes it, or {add}"
    if any(map(named, keeps)):
        return None
    worded = [s for s in segments if s.strip(BLANK)] or [""]
    first = next((s for s in worded if s in near), worded[-1])
    line = "{pre}" + _numbered(first) + ".{rest}" * (first != segments[-1]) if first else "{rest}"
    add = _added(line, template, named)
    if _FUSED.search(template):
        held = "no rule claims it: all experts in one tensor, as Transformers holds them in memory"
        return f'{held}. Fix: layout="fused" where the family has it; else a rule for it, or {add}'
    return f"no rule claims it, and it looks like an expert's. Fix: add a rule for it, or {add}"


def _added(line: str, template: str, enough: Callable[[Keep], bool]) -> str:
    """What to add to a table: a keep of this line, or of the whole name, whichever keeps it; for a few no text does."""
    for spelled in (line, _numbered(template), "{n}." + _numbered(template.partition(".")[2])):
        with suppress(AdapterError):
            keep = Keep(parse(spelled))
            if patterns(keep.rule)[0].match(template) is not None and enough(keep):
                return f'| keep("{spelled}")'
    return "another name, which a pattern can spell"


def _numbered(segment: str) -> str:
    r"""A segment as a keep in quotes spells it: what is a number, or what no address or quotes may hold, as a capture.

    >>> _numbered("expert_7"), _numbered('expert"{\\0}'), _numbered(BLANK)
    ('expert_7', 'expert{n0}0{n1}', '{n0}')
    """
    first, *others = _ODD.split(segment)
    return first + "".join(f"{{n{i}}}{text}" for i, text in enumerate(others))


@lru_cache(maxsize=1 << 14)
def _begins(region: Pattern, template: str) -> bool:
    return region.match(template) is not None


@lru_cache(maxsize=4096)
def _region(rule: Rule) -> tuple[Region, ...]:
    """Names that begin as the rule's do, up to the segment with the first capture that counts experts or halves."""
    parts: list[str | Capture] = []
    for part in rule.source.parts:
        if isinstance(part, Capture) and part.name in rule.stacked and (part.choices or part.name == "e"):
            break
        parts.append(part)
    else:
        return ()
    while parts and not (isinstance(parts[-1], str) and "." in parts[-1]):
        parts.pop()
    if not parts:
        return ()
    stem = str(parts[-1]).rpartition(".")[0]
    word, tail = stem.rpartition(".")[2], "rest"
    while tail in rule.source.captures:
        tail += "_"
    if not word:
        return ()
    beginning = Address((*parts[:-1], stem + ".", Capture(tail)))
    return (Region(word, Pattern(beginning, patterns(rule)[0].indexed - {tail})),)
