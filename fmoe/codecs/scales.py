"""Rules for scales, derived from those for weights: they lie as their weights do, a block for a number.

A weight rule relates `i` and `d`, the sizes of an expert's matrix. Its scales have letters of their own there, since of
blocks there are fewer; all else, experts and halves above all, they share.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fmoe.codecs.formats import APART, OF_STACKS, Format
from fmoe.codecs.parts import ACTIVATION, Parts
from fmoe.layout.claims import some
from fmoe.layout.entries import Either, Entry, Keep, Together, walk
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule, interned
from fmoe.layout.spelled.address import Address, Capture
from fmoe.layout.stage import Stage
from fmoe.layout.table import Table
from fmoe.types import Problem, TensorSpec

_INPUT = {"gate_and_up_projs": "d", "down_projs": "i"}  # the letter that products sum over
BLOCKS = {"gate_and_up_projs": {"i": "j", "d": "c"}, "down_projs": {"i": "s", "d": "t"}}
Dims = tuple[tuple[str, ...], ...]


def turned(formats: Iterable[Format], method: str | None) -> bool:
    """Whether codes lie the other way than the weight's rule says: a format has them so, and config says no other."""
    others = {f.method.partition(" ")[0] for f in formats if not f.transposed}
    return any(f.transposed for f in formats) and method not in others


def with_scales(
    entries: Iterable[Entry], formats: tuple[Format, ...], *, keep: bool, flip: bool = False
) -> tuple[Entry, ...]:
    """The entries, and beside every weight rule those of its scales. keep: weights are codes, laid out as stored.

    flip: which is `turned`. Scales of activations, which may be there for some experts only, keep their names.
    """
    every = [*walk(entries)]
    rules = [e for e in every if isinstance(e, Rule) and matrix(e)]
    passed = [k for rule in rules for k in _passed(rule)]
    if rules and any(isinstance(e, Keep) and str(e.pattern) == "{rest}" for e in every):
        passed += [Keep(Address((Capture("rest"), f".{part}"))) for part in APART]
    return (*_with(entries, formats, keep, flip), *dict.fromkeys(passed))


def _passed(rule: Rule) -> Iterable[Keep]:
    *stem, last = rule.source.parts
    if isinstance(last, str) and last.endswith(".weight"):
        yield from (Keep(Address((*stem, last.removesuffix("weight") + part))) for part in APART)
    elif isinstance(last, str) and last.endswith("_weight"):
        yield from (Keep(Address((*stem, f"{last}.{part}"))) for part in OF_STACKS)


def _with(entries: Iterable[Entry], formats: tuple[Format, ...], keep: bool, flip: bool) -> tuple[Entry, ...]:
    made: list[Entry] = []
    for entry in entries:
        if isinstance(entry, Either):
            options = tuple((n, _with(o, formats, keep, flip)) for n, o in entry.options)
            made.append(replace(entry, options=options))
        elif isinstance(entry, Together | Rule):
            rules = entry.rules if isinstance(entry, Together) else (entry,)
            weights = [r for r in rules if matrix(r)]
            kept = tuple(_codes(r, formats, flip) if keep and matrix(r) else r for r in rules)
            made.append(Together(kept, entry.flipped) if isinstance(entry, Together) else kept[0])
            for kind in _kinds(formats):
                found = [r for w in weights if (r := _scales(w, *kind)) is not None]
                made += found
        else:
            made.append(entry)
    return tuple(made)


def matrix(rule: Rule) -> str | None:
    """Which of the two stacks of matrices a rule makes."""
    last = rule.target.name.rpartition(".")[2]
    return last if last in _INPUT and rule.source.axes and {"i", "d"} <= set(rule.source.atoms) else None


def in_out(stages: Iterable[Stage]) -> bool:
    """Whether a file's experts are stacks of matrices [in, out], and in no layout others."""
    rules = [e for s in stages if isinstance(s, Table) for e in walk(s.entries) if isinstance(e, Rule) and matrix(e)]
    return bool(rules) and all(_INPUT[matrix(r) or ""] in (*((), ()), *(r.source.axes or ()))[-2] for r in rules)


def _kinds(formats: tuple[Format, ...]) -> list[tuple[tuple[str, ...], str, bool]]:
    """(suffixes, what they have a number for, whether the weight is stored transposed)"""
    found: dict[tuple[str, bool], dict[str, None]] = {}
    more = lambda kind, turned, *names: found.setdefault((kind, turned), {}).update(dict.fromkeys(names))
    for f in formats:
        kind = "tensor" if f.rank == 0 else "experts" if f.rank == 1 else "each" if f.each else "blocks"
        more(kind, f.transposed, f.beside)
        if f.second:
            lone = "tensor" if f.lone == "()" else "experts"
            more(lone if f.stack else kind, f.transposed, f"{f.beside}_second")
        if f.third:
            more("tensor", False, f"{f.beside}_third")
        if f.activation:
            more("tensor", False, ACTIVATION[0])
            more("experts", False, ACTIVATION[1])
    return [(tuple(names), kind, turned) for (kind, turned), names in found.items()]


def _scales(rule: Rule, suffixes: tuple[str, ...], kind: str, transposed: bool) -> Rule | None:
    source, target = _named(rule.source, suffixes), _named(rule.target, suffixes)
    here, there = rule.source.axes or (), rule.target.axes or ()
    if kind == "tensor":
        shared = set(source.captures) == set(target.captures)
        return interned(replace(source, axes=None), replace(target, axes=None)) if shared else None
    if kind in ("experts", "each"):
        alone = [d for d in here if not {"i", "d"} & set(d)]
        named = {c for c in source.captures if c not in target.captures} - {"scale"}
        if not alone or len(here) != len(alone) + 2 or any((c,) not in alone for c in named - {"e"}):
            return None
        ones = (("1",), ("1",)) if kind == "each" else ()
        return interned(replace(source, axes=(*alone, *ones)), replace(target, axes=(*alone, *ones)))
    here = _turned(here) if transposed else here
    letters = dict(BLOCKS[matrix(rule) or ""])
    both = [d for d in here if len(d) > 1 and d in there]  # joined alike on both sides: of blocks, one dimension
    source = replace(source, axes=_lettered(here, letters, both))
    bounds = tuple(b for b in rule.bounds if b[0] not in letters)
    return interned(source, replace(target, axes=_lettered(there, letters, both)), bounds)


def _lettered(dims: Dims, letters: Mapping[str, str], both: list[tuple[str, ...]]) -> Dims:
    joined = lambda d: (next(letters[a] for a in d if a in letters),)
    return tuple(joined(d) if d in both else tuple(letters.get(a, a) for a in d) for d in dims)


def _codes(rule: Rule, formats: tuple[Format, ...], flip: bool) -> Rule:
    """The rule for a weight's codes: where several share a stored number, their axis has a size of its own."""
    source = replace(rule.source, axes=_turned(rule.source.axes or ())) if flip else rule.source
    if all(f.packed == 1 for f in formats):
        return interned(source, rule.target, rule.bounds)
    letter = {"gate_and_up_projs": {"d": "p"}, "down_projs": {"i": "q"}}[matrix(rule) or ""]
    swap = lambda a: replace(a, axes=tuple(tuple(letter.get(x, x) for x in d) for d in a.axes or ()))
    return interned(swap(source), swap(rule.target), tuple(b for b in rule.bounds if b[0] not in letter))


def _turned(dims: Dims) -> Dims:
    return (*dims[:-2], dims[-1], dims[-2])


def _named(address: Address, suffixes: tuple[str, ...]) -> Address:
    *parts, last = address.parts
    if len(suffixes) > 1:
        return Address((*parts, last, Capture("scale", suffixes)), address.axes)
    return Address((*parts, last + suffixes[0]) if isinstance(last, str) else (*parts, last, *suffixes), address.axes)


@dataclass(frozen=True)
class Seam:
    """A rule joins a dimension of its sources with others: blocks across it stay whole only where they end at its end.

    dim: which, counted from the last. last: whether its numbers lie side by side where it is joined. turned: of a
    family that has codes which lie the other way than its bf16 weights, whether those are what the rule is for.
    """

    rule: Rule
    dim: int | None
    last: bool = True
    turned: bool | None = None

    def problems(self, specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> list[Problem]:
        """What of these tensors the rule would tear, or turn."""
        wrong = []
        mine = [n for _, _, rows in hits(self.rule, Names({**specs, **found})) for n in rows.names]
        if self.turned and (plain := tuple(n for n in mine if n not in found)):
            text = f"{some(plain)}: not quantised, and quantized='keep' moves codes: leave it out"
            wrong.append(Problem(text, plain))
        for n in mine:
            if n in found and self.turned not in (None, found[n].format.transposed):
                method = found[n].format.method.partition(" ")[0]
                told = f"{n!r} is in {found[n].format.name}, and config.json's quantization_config speaks of another: "
                fix = f"Fix: quant_method {method!r} there, or decode it, without quantized='keep'"
                wrong.append(Problem(f"{told}codes of the two lie otherwise. {fix}", (n,)))
            if self.dim is None or n not in found:
                wrong += self._along(n, found[n].format) if n in found and self.turned is None else []
                continue
            side, size = found[n].format.block[self.dim], found[n].format.as_stored(found[n].shape)[self.dim]
            if side > 1 and (size % side or not self.last):
                how = f"{size} is no multiple of {side}" if self.last else "its rows are interleaved with others"
                text = f"{n!r} {list(found[n].shape)}: {how}, so blocks of {side} would not stay whole where "
                wrong.append(Problem(f"{text}{self.rule.target} joins them: decode it, without quantized='keep'", (n,)))
        return wrong

    def _along(self, name: str, f: Format) -> list[Problem]:
        """A problem where several codes of one stored element are summed over by no product."""
        letter, dims = _INPUT[matrix(self.rule) or ""], self.rule.source.axes or ()
        if f.packed == 1 or f.transposed or letter in dims[-2 if f.across else -1]:
            return []
        text = f"{name!r} is in {f.name}, several codes an element along an axis that no product sums over"
        return [Problem(f"{text}. Fix: decode it, without quantized='keep'", (name,))]


def seams(entries: Iterable[Entry], formats: tuple[Format, ...], flip: bool) -> tuple[Seam, ...]:
    """Every place where rules for codes join blocks. flip: `turned`."""
    found: list[Seam] = []
    for entry in entries:
        if isinstance(entry, Either):
            found += [s for _, option in entry.options for s in seams(option, formats, flip)]
            continue
        for rule in entry.rules if isinstance(entry, Together) else (entry,) if isinstance(entry, Rule) else ():
            if not matrix(rule):
                continue
            here, there = rule.source.axes or (), rule.target.axes or ()
            here = _turned(here) if flip else here
            found += [Seam(rule, None)] if here else []
            found += [Seam(rule, None, turned=flip)] if any(f.transposed for f in formats) else []
            for dim in (-1, -2):
                for letter in (a for a in here[dim] if a in ("i", "d")):
                    joined = next(d for d in there if letter in d)
                    if joined != here[dim]:
                        last = joined[-1] == letter and here[dim] == (letter,)
                        found.append(Seam(rule, dim, last))
    return tuple(dict.fromkeys(found))
