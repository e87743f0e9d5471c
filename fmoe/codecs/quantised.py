"""The stage of a family's formats: every quantised tensor decoded, its scales kept beside it, and encoded back.

With `keep`, codes and scales move as they are instead, under the names that decoding would give them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from fmoe.codecs import Changed, CodecPlan
from fmoe.codecs.carried import activations, beside, left_out, renamed, written
from fmoe.codecs.changes import cuts, decoding, encoding, keeping, rows
from fmoe.codecs.foreign.lists import Lists
from fmoe.codecs.foreign.undecoded import left_alone, lone, unread
from fmoe.codecs.format import Format
from fmoe.codecs.formats import FORMATS, elsewhere
from fmoe.codecs.parts import ACTIVATION, Fresh, Parts, as_named, in_file, own, spell
from fmoe.codecs.scales import Seam
from fmoe.codecs.survival import Survival
from fmoe.codecs.unscaled import cut_across, left_plain, unscaled, with_rules
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.layout.notation import Rule
from fmoe.types import AdapterError, TensorSpec


@dataclass(frozen=True)
class Quantised:
    """X -> decode(X's parts), its scales beside it, for every X that is stored in one of the formats.

    dtype: what tensors decode to. fresh: the family's formats, and for each the names that a fresh export writes in
    it. block: the rows and columns of FP8's blocks; restarts: where they begin again (`Stored`). quantization: None
    encodes what carries scales, True that and all that is fresh, False nothing (leaving scales out). keep: codes stay
    codes. seams: where rules join blocks, which codes must fit. experts: the rules of expert weights. told: called
    with the `Survival` of each tensor that changed since it was decoded. declared: the config or the names say that it
    is quantised. gptq: `gptq_version` of its config. undecoded: the format that it says, if that is not read.
    lists: what config says of modules by name. was: the family's formats, where fresh are others to write instead.
    """

    dtype: torch.dtype
    fresh: Fresh
    block: tuple[int, int] = (128, 128)
    restarts: tuple[tuple[int, int], ...] = ()
    quantization: bool | None = None
    keep: bool = False
    seams: tuple[Seam, ...] = ()
    experts: tuple[Rule, ...] = ()
    declared: bool = False
    lists: Lists = Lists()
    undecoded: str | None = None
    gptq: str | None = None
    was: Fresh | None = None
    flipped: bool = False
    told: Callable[[Survival], None] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def own(self) -> tuple[Format, ...]:
        """Those to write, of the config's block size."""
        anew = replace(self, block=(128, 128)) if self.was is not None and self.block[0] == 1 else self  # MXFP8's rows
        return tuple(anew._sized(FORMATS[name]) for name, _ in self.fresh)

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Those of the family, and those that a tensor of any may be in."""
        return (*(self._sized(FORMATS[n]) for n, _ in self.known), *map(self._sized, elsewhere(dict(self.known))))

    @property
    def known(self) -> Fresh:
        return self.fresh if self.was is None else self.was

    @cached_property
    def readable(self) -> tuple[Format, ...]:
        """Those that this checkpoint may hold, as far as its config says."""
        other = "gptq" if self.gptq == "gptq_v2" else "gptq_v2"
        told = lambda f: replace(f, unsaid="version" if self.gptq is not None else "method")
        unsaid = lambda f: f.zeros == "gptq" and not self.gptq
        return tuple(told(f) if unsaid(f) else f for f in self.formats if f.zeros != other)

    def _sized(self, f: Format) -> Format:
        return replace(f, block=self.block, restarts=self.restarts) if f.block == (128, 128) else f

    @property
    def lossless(self) -> bool:
        return self.keep or not (self.declared or self.quantization)

    @property
    def inverse(self) -> "Quantised":
        return replace(self, flipped=not self.flipped)

    def choose(self, choices: Mapping[str, Any]) -> "Quantised":
        asked = choices.get("quantization", self.quantization)
        if self.keep and asked is not None:
            raise AdapterError(f"quantization={asked}: with quantized='keep' what is quantised stays so")
        return replace(self, quantization=asked)

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {}

    def axes(self) -> frozenset[str]:
        return frozenset()

    def resolve(self, names: Names, *, default: bool) -> "Quantised":
        parts = {t for f in self.formats for t in (f.scale, *((f.weight,) if own(f.weight) else ()))}
        tails = tuple(f.beside for f in self.formats)
        if not self.flipped:
            tails += tuple(t.partition("}")[2] for t in parts)
        found = any(template.endswith(tails) for template in names.rows)
        if found and {"{S}.scale", "{X}.scale"} & parts and not self.flipped:  # which may be another word
            found = list(renamed(names, self.formats, self.known)) != names.names
        return replace(self, declared=found)

    def rename(self, names: Names) -> list[str]:
        if not self.flipped:
            return list(dict.fromkeys(renamed(names, self.formats, self.known)))
        return [new for n in names.names for new in self._spelled(n)]

    def _spelled(self, name: str) -> list[str]:
        """A name of ours, as a file of the family would have it."""
        for suffix in ACTIVATION.values():
            if (x := name.removesuffix(suffix)) != name:
                return [n for f in self.formats for t in f.activation if (n := spell(t, x))][:1] or [name]
        for f in self.formats[len(self.known) :]:
            ends = {f"{f.beside}_third": f.third, f"{f.beside}_second": f.second, f.beside: f.scale}
            end = next((e for e in ends if name.endswith(e)), "")
            x, part = name.removesuffix(end), ends.get(end)
            if x != name and part and f.beside != "_scale_inv" and (new := spell(part, x)) is not None:
                return [new]
        for f, (_, pattern) in zip(self.own, self.fresh, strict=True):
            x = name.removesuffix(f.beside)
            part = f.scale if x != name else f.weight
            if self.declared and (own(part) or x != name) and (pattern is None or re.fullmatch(pattern, x)):
                if (new := spell(part, x)) is not None:
                    return [new]
        return [name]

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        if self.flipped:
            found, problems = beside(specs, names, self.formats, kept=self.keep, left=self.quantization is False)
        else:
            found, problems = in_file(specs, names, self.readable, self.known, self.lists)
            problems = [*unread(self.undecoded, specs, found), *lone(names, found), *problems]
            problems += left_alone(self.lists, found)
        problems += cut_across(found, window)
        problems += unscaled(specs, found, self.experts, {key for problem in problems for key in problem.keys})
        if self.keep:
            problems += [p for seam in self.seams for p in seam.problems(specs, found)]
        made = self._kept if self.keep else self._encoding if self.flipped else self._decoding
        passed = not found and not (self.flipped and self.quantization is not None)
        plan = CodecPlan(dict(specs), (), str(self)) if passed else made(specs, found)
        if problems:
            raise AdapterError(problems, rest=plan)
        return plan

    def _decoding(self, specs: Specs, found: Mapping[str, Parts]) -> CodecPlan:
        first: dict[str, Parts] = {p.codes: p for p in found.values()}
        parts = {n for p in found.values() for n in p.stored} | activations(found, 0)
        targets: dict[str, TensorSpec] = {}
        changes: list[Changed] = []
        passed: dict[str, str] = {}
        for name, spec in specs.items():
            if p := first.get(name):
                made = p.here_specs(specs, self.dtype)
                targets |= made
                whole = rows(p) | ({p.extent: 0} if p.extent else {})
                changes.append(Changed(p.stored, [*made], decoding(p, self.dtype), whole, cuts(p, False)))
                if p.activation:
                    targets[p.activation[1]] = specs[p.activation[0]]
                    passed[p.activation[1]] = p.activation[0]
            elif name not in parts:
                targets[name] = spec
        return CodecPlan(targets, tuple(changes), str(self), renamed=passed)

    def _encoding(self, specs: Specs, carried: Mapping[str, Parts]) -> CodecPlan:
        gone = {here for p in carried.values() for _, here, _, _ in p.kept} | activations(carried, 1)
        if self.quantization is False:
            gone |= left_out(specs, carried, self.formats)
            return CodecPlan({n: s for n, s in specs.items() if n not in gone}, (), str(self))
        if self.was is not None:
            carried, other = written(carried, self.fresh)
            gone |= left_out({}, other, ())
        left = {n: s for n, s in specs.items() if n not in gone}
        chosen = dict(carried) | (self._chosen(left, carried) if self.quantization else {})
        targets: dict[str, TensorSpec] = {n: s for n, s in left.items() if n not in chosen}
        changes, passed = [], {}
        for p in chosen.values():
            targets |= p.there_specs(specs if p.name in carried else {})
            if p.activation:
                targets[p.activation[0]] = specs[p.activation[1]]
                passed[p.activation[0]] = p.activation[1]
            sources = [p.name, *(here for _, here, _, _ in p.kept)] if p.name in carried else [p.name]
            whole = p.format.rank == 0 or p.extent is not None
            changes.append(Changed(sources, p.stored, encoding(p, self.told), {} if whole else rows(p), cuts(p, True)))
        return CodecPlan(targets, tuple(changes), str(self), renamed=passed)

    def _chosen(self, specs: Specs, carried: Mapping[str, Parts]) -> dict[str, Parts]:
        if all(pattern is None for _, pattern in self.fresh):
            raise AdapterError("quantization=True: the family has no quantised form; pass quantization=None")
        made: dict[str, Parts] = {}
        specs = {n: specs[n] for n in with_rules(specs, self.experts) if not self.lists.alone(n)}
        for n in sorted(n for n, s in specs.items() if n not in carried and s.dtype.is_floating_point):
            for f, (_, pattern) in zip(self.own, self.fresh, strict=True):
                shape, stacks = specs[n].shape, f.each or f.grouped or self.was is not None
                if pattern is None or not re.fullmatch(pattern, n) or len(shape) not in (2, 2 + bool(stacks)):
                    continue
                if f.fits(shape) and (p := as_named(n, f, shape)) is not None:
                    made[n] = p
                    break
        fresh = [(f, pattern) for f, (_, pattern) in zip(self.own, self.fresh, strict=True) if pattern is not None]
        if problems := [*left_plain(specs, made.keys() | carried.keys(), fresh)]:
            raise AdapterError(problems)
        if self.was is not None and not made and not carried:
            text = "no tensor of this checkpoint can be written in {}: expected experts that fit it"
            raise AdapterError(text.format(", ".join(f.name for f, _ in fresh)))
        return made

    def _kept(self, specs: Specs, found: Mapping[str, Parts]) -> CodecPlan:
        """Parts passed on under other names; the shape that int4 stores beside its codes, compared or made again."""
        place = {(p.name if self.flipped else p.codes): p for p in found.values()}
        gone = {n for p in found.values() for n in ([k[1] for k in p.kept] if self.flipped else p.stored)}
        gone |= activations(found, 1 if self.flipped else 0)
        targets: dict[str, TensorSpec] = {}
        changes, passed = [], dict[str, str]()
        for name, spec in specs.items():
            if p := place.get(name):
                made = p.there_specs(specs) if self.flipped else p.here_specs(specs)
                targets |= made
                if p.format.words or p.format.zeros or p.extent:
                    ends = ([p.name, *(k[1] for k in p.kept)], p.stored)
                    ends = ends if self.flipped else (p.stored, [*made])
                    changes.append(Changed(*ends, keeping(p, self.flipped), {}, (0,) * len(p.shape)))
                else:
                    pairs = [(p.codes, p.name), *(k[:2] for k in p.kept)]
                    passed |= {there: here for there, here in pairs} if self.flipped else {h: t for t, h in pairs}
                if p.activation:
                    source, target = reversed(p.activation) if self.flipped else p.activation
                    passed[target] = source
                    targets[target] = specs[source]
            elif name not in gone:
                targets[name] = spec
        return CodecPlan(targets, tuple(changes), str(self), renamed=passed)

    def __str__(self) -> str:
        names = ", ".join(name for name, _ in self.fresh)
        if self.keep:
            return f"keep codes and scales: {names}"
        return (f"encode {names}" if self.flipped else f"decode {names} to {self.dtype}") + ", where scales are"
