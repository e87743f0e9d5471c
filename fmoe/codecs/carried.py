"""Quantised tensors among names of ours: what carries scales, or is codes; and what a file's names become."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fmoe.codecs.format import Format
from fmoe.codecs.formats import APART, FORMATS, OF_STACKS
from fmoe.codecs.parts import ACTIVATION, FIX, Found, Fresh, Parts, Specs, as_named, is_part, own, read, spell
from fmoe.layout.names import Names
from fmoe.types import Problem, TensorSpec


def beside(specs: Specs, names: Names, formats: Iterable[Format], *, kept: bool, left: bool = False) -> Found:
    """The tensors among these names that carry scales (kept: that are codes), and the scales that are no tensor's.

    left: scales are left out, so that those that fit no format, or several, are no matter.
    """
    found: dict[str, Parts] = {}
    problems: list[Problem] = []
    formats = [*formats]
    for suffix in dict.fromkeys(f.beside for f in formats):
        mine = [f for f in formats if f.beside == suffix]
        for name in (n for n in names.ending((suffix,)) if n != suffix):
            x = name.removesuffix(suffix)
            if x not in specs:
                problems.append(Problem(f"{name!r} is the scale of {x!r}, which is missing. {FIX}", (name, x)))
                continue
            if not kept and (not specs[x].dtype.is_floating_point or specs[x].dtype.itemsize < 2):
                text = f"{x!r} is {specs[x].dtype} beside a scale, expected numbers to encode"
                problems.append(Problem(f"{text}: quantized='keep' keeps codes", (x, name)))
                continue
            made = [p for f in mine if (p := _carried(x, name, f, specs, kept)) is not None]
            if len({p.format.name for p in made}) == 1:
                found[x] = made[0]
            elif not left:
                blocks = " or ".join(_blocks(f) for f in mine)
                why = (
                    "such a scale is one of several formats, for"
                    if made
                    else f"expected one for each {blocks} block of"
                )
                text = f"{name!r} is {list(specs[name].shape)} {specs[name].dtype}, {why}"
                problems.append(Problem(f"{text} {x!r} {list(specs[x].shape)} {specs[x].dtype}", (name, x)))
    held = {p.activation[1] for p in found.values() if p.activation}
    for name in names.ending(tuple(ACTIVATION.values())) if any(f.activation for f in formats) else ():
        if name not in held and not left:
            problems.append(Problem(f"{name!r} is a scale of activations for a tensor that carries no scale", (name,)))
    return found, problems


def _carried(x: str, scale: str, f: Format, specs: Specs, kept: bool) -> Parts | None:
    shape = f.kept_shape(specs[x]) if kept else specs[x].shape
    if shape is None:
        return None
    if f.sizes:
        f = replace(f.named(x), form="").sized(shape, specs[scale].shape)
        f = replace(f, form=FORMATS[f.name].form)
    if not f.fits(shape) or specs[scale] != TensorSpec(f.scale_shape(shape), specs[scale].dtype):
        return None
    made = as_named(x, f, shape)
    if made is None or specs[scale].dtype not in f.scales:
        return None
    if made.third and made.third[1] not in specs:
        return None
    if made.second and (made.second[1] not in specs or f.zeros and specs[made.second[1]] != f.held_second(shape)):
        return None
    if f.order and (order := spell(f.order, x)) in specs:
        made = replace(made, order=order)
    held = [n for n in (x + a for a in ACTIVATION.values()) if n in specs] if f.activation else []
    if not held:
        return made
    name = next(n for t in f.activation if (n := spell(t, x)))
    return replace(made, activation=(name, held[0]))


def activations(found: Mapping[str, Parts], side: int) -> set[str]:
    """The scales of activations of these tensors: 0, as a file names them; 1, as they are beside."""
    return {p.activation[side] for p in found.values() if p.activation}


def left_out(specs: Specs, carried: Mapping[str, Parts], formats: Iterable[Format]) -> set[str]:
    """All that stands beside tensors because they were quantised, and that no numbers need."""
    apart = (*(f"{{S}}.{part}" for part in APART), *(f"{{X}}.{part}" for part in OF_STACKS))
    gone = {n for p in carried.values() for part in apart if (n := spell(part, p.name))}
    ends = {f"{f.beside}{part}" for f in formats for part in ("", "_second", "_third")} | {*ACTIVATION.values()}
    return gone | {n for n in specs for end in ends if n.endswith(end) and n.removesuffix(end) in specs}


def written(carried: Mapping[str, Parts], fresh: Fresh) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """Those in a format that is written anew too, in groups of any size, which stay as they are; and the others."""
    kind = lambda f: f.name if f.method == "fp8" else (f.method, f.code, f.zeros, f.weight, f.stack)
    ours = {kind(FORMATS[name]) for name, pattern in fresh if pattern is not None}
    mine = {n: p for n, p in carried.items() if kind(p.format) in ours}
    return mine, {n: p for n, p in carried.items() if n not in mine}


def _blocks(f: Format) -> str:
    return "x".join(str(b or "all") for b in f.block)


def renamed(names: Names, formats: tuple[Format, ...], fresh: Fresh) -> Iterator[str]:
    """What a file's names become, as far as names can tell."""
    pairs = lambda f: (
        (f.scale, f.beside),
        (f.weight, ""),
        (f.second or "{X}", f"{f.beside}_second"),
        (f.third or "{X}", f"{f.beside}_third"),
    )
    templates = [(t, s, f) for f in formats for t, s in pairs(f) if own(t)]
    templates = [(t, s, f) for t, s, f in templates if t != "{X}" + s]
    tails = tuple(dict.fromkeys(t.partition("}")[2] for t, _, _ in templates))
    if not (ending := set(names.ending(tails))):
        yield from names.names
        return
    there = frozenset(names.names)
    for name in names.names:
        if name not in ending:
            yield name
            continue
        made = ((x, s, t, f) for t, s, f in templates if (x := read(t, name)) is not None and spell(t, x) == name)
        yield next((x + s for x, s, t, f in made if is_part(t, x, f, there, fresh)), name)
