"""LoRA rules, derived from weight rules: output axes go to B, input axes to A, and the rank `r` is a fresh axis.

    W      {pre}layers.{l}.mlp.experts.{e}.{g=gate|up}_proj.weight [i d]         gate_and_up_projs [e d (g i)]
    A      {pre}layers.{l}.mlp.experts.{e}.{g=gate|up}_proj.lora_A.weight [r d]  lora_gate_and_up_A [e d g r]
    B      {pre}layers.{l}.mlp.experts.{e}.{g=gate|up}_proj.lora_B.weight [i r]  lora_gate_and_up_B [e r (g i)]

That is the per-expert form. In PEFT's form one wrapper adapts a whole fused parameter `[e (g i) d]` of Transformers'
in-memory module: `lora_A [(e r) d]` and `lora_B [(g i) (r e)]`, experts outermost in A and innermost in B.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from fmoe.layout.entries import Either, Entry, Together
from fmoe.layout.notation import Rule, interned
from fmoe.layout.spelled.address import Address, Capture
from fmoe.types import AdapterError, brief

CURRENT = "0.21.2"  # the PEFT release whose form is written where nothing else is asked for
NATIVE = {"gate_and_up_projs": "lora_gate_and_up", "down_projs": "lora_down"}
"""A weight's bare native name -> its LoRA matrices', without `_A` and `_B`."""

Dim = tuple[str, ...]
Parts = tuple[str | Capture, ...]


@dataclass(frozen=True)
class Wrapper:
    """One parameter that PEFT can wrap: its module's name, its own, and the axes of both sides.

    weight: the fused parameter <-> the native weight. module: all but the last segment of its name.
    """

    weight: Rule
    module: Parts
    parameter: str

    def rules(self, version: str, marked: bool, inner: bool, grouped: bool = False) -> tuple[Rule, Rule]:
        """Its A and B, as a version of PEFT lays them. inner: another wrapper is around it; grouped: see `Forms`."""
        stem = ended(self.module, ".base_layer" if inner else "")
        (e,), first, last = self.weight.source.axes or ()
        one, other = (last, first) if takes_last(version, marked) else (first, last)
        made, packed = [], (e, "r") if grouped else ("r", e)
        for name, dim, axes in (("A", one, ((e, "r"), one)), ("B", other, (other, packed))):
            matrix = "A" if set(dim) == set(_native_dims(self.weight)[0]) else "B"
            made.append(_rule(self.weight, Address(ended(stem, f".lora_{name}.weight"), axes), matrix))
        return made[0], made[1]

    def naming(self) -> Rule:
        """The name of its native matrix A <-> its own in Transformers' model."""
        bare = _last(self.weight.target.parts)
        native = ended(self.weight.target.parts, f"{NATIVE[bare]}_A", drop=bare)
        return interned(Address(_anywhere(native)), Address(_anywhere(ended(self.module, f".{self.parameter}"))))


@dataclass(frozen=True)
class Forms:
    """The forms in which a family's LoRA matrices lie in files, all of one native form.

    per_expert: a matrix for each expert and projection; A of gate and up apart, `[e d g r]`. wrappers: what PEFT can
    wrap. no_peft: why it can wrap nothing. marked: whether Transformers' module says `is_transposed` where it is.
    rank: of all, where experts are not counted. grouped: B is `[out (e r)]`. joined: gate and up are one file's matrix.
    """

    per_expert: tuple[Rule, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    no_peft: str = "no rules were given"
    marked: bool = True
    rank: int | None = None
    grouped: bool = False
    joined: bool = False

    @property
    def nested(self) -> bool:
        """Whether one module holds both parameters, so that one wrapper stands around the other."""
        return len({w.module for w in self.wrappers}) < len(self.wrappers)

    def peft(self, version: str, kind: str) -> tuple[Rule, ...]:
        """The rules of modules of a kind: "both" parameters wrapped, or "gate_and_up" or "down" alone."""
        rules: list[Rule] = []
        for w in self.wrappers:
            mine = part(w.weight)
            if kind in ("both", mine):
                marked = self.marked and (w.weight.source.axes or ())[1] == _native_dims(w.weight)[0]
                rules += w.rules(version, marked, (kind, mine) == ("both", "gate_and_up") and self.nested, self.grouped)
        sized = lambda r: r if self.rank is None or _experts(r) in r.bound else r.bind({"r": self.rank})
        return tuple(dict.fromkeys(map(sized, rules)))

    def bind(self, sizes: Mapping[str, int | Iterable[int]]) -> "Forms":
        wrappers = tuple(replace(w, weight=w.weight.bind(sizes)) for w in self.wrappers)
        return replace(self, per_expert=tuple(r.bind(sizes) for r in self.per_expert), wrappers=wrappers)


def derive(entries: Iterable[Entry], unwrapped: str = "", marked: bool = True) -> Forms:
    """The LoRA forms of a table of weight rules. unwrapped: why PEFT cannot wrap what they describe, if so.

    >>> import fmoe
    >>> table, = (fmoe.rule("{e}.up.weight [i d]", "{e}.x [i d]") | fmoe.families.layouts.experts()).stages
    >>> for rule in derive(table.entries).per_expert[2:]:
    ...     print(rule)
    {pre}layers.{l}.mlp.experts.{e}.down_proj.lora_A.weight [r i]  <->  {pre}layers.{l}.mlp.experts.lora_down_A [e i r]
    {pre}layers.{l}.mlp.experts.{e}.down_proj.lora_B.weight [d r]  <->  {pre}layers.{l}.mlp.experts.lora_down_B [e r d]
    """
    found = [(label, rule) for label, rule in _labelled(entries) if _is_weight(rule)]
    single = [r for _, r in found if _is_matrix(r) and str(r.source.parts[-1]).endswith(".weight")]
    fused = [(label, r) for label, r in found if not r.stacked and (r.source.axes or ((),))[0] == (_experts(r),)]
    memory = [r for label, r in fused if label == "fused"] or [r for label, r in fused if not label]
    per_expert = [m for r in single or _one_by_one(r for _, r in found) for m in _matrices(r)]
    wrappers = tuple(dict.fromkeys(_wrapper(r) for r in memory if len(r.source.axes or ()) == 3))
    parts = {part(w.weight) for w in wrappers}
    why = unwrapped or ("" if len(parts) == 2 else "its rules name no fused parameters [experts, out, in] of a module")
    return Forms(tuple(dict.fromkeys(per_expert)), () if why else wrappers, why, marked)


def shared(rule: Rule) -> Rule:
    """The rule of a matrix A with one for gate and up: gate's name alone, `[e d r]`; another rule as it is."""
    g = next((c for c in rule.source.captures.values() if c.name in rule.stacked and c.choices), None)
    if g is None or not _last(rule.target.parts).endswith("_A"):
        return rule
    source = replace(rule.source, parts=merged(g.choices[0] if p is g else p for p in rule.source.parts))
    axes = tuple(dim for dim in rule.target.axes or () if dim != (g.name,))
    return interned(source, replace(rule.target, axes=axes), tuple(b for b in rule.bounds if b[0] != g.name))


def _is_weight(rule: Rule) -> bool:
    dims = rule.target.axes or ()
    return _last(rule.target.parts) in NATIVE and len(dims) == 3 and len(dims[0]) == 1


def _is_matrix(rule: Rule) -> bool:
    """Whether its sources are matrices of one expert, with the native input as a dimension."""
    dims = [set(dim) for dim in rule.source.axes or ()]
    return _experts(rule) in rule.stacked and len(dims) == 2 and dims.count(set(_native_dims(rule)[0])) == 1


def _labelled(entries: Iterable[Entry], label: str = "") -> Iterator[tuple[str, Rule]]:
    """Every rule, with the option that it belongs to."""
    for entry in entries:
        if isinstance(entry, Either):
            for name, option in entry.options:
                yield from _labelled(option, name)
        elif isinstance(entry, Together):
            yield from ((label, rule) for rule in entry.rules)
        elif isinstance(entry, Rule):
            yield label, entry


def _matrices(rule: Rule) -> tuple[Rule, Rule]:
    """A and B of a per-expert weight rule."""
    inward, _ = _native_dims(rule)
    stem = ended(rule.source.parts, "", drop=".weight")
    dims = rule.source.axes or ()
    into = next(dim for dim in dims if set(dim) == set(inward))
    out = next(dim for dim in dims if dim != into)
    own = tuple((c,) for c in rule.stacked if c != _experts(rule))
    a = _rule(rule, Address(ended(stem, ".lora_A.weight"), (("r",), into)), "A", own)
    return a, _rule(rule, Address(ended(stem, ".lora_B.weight"), (out, ("r",))), "B")


def _rule(weight: Rule, source: Address, matrix: str, own: tuple[Dim, ...] = ()) -> Rule:
    """source <-> the native matrix A [e in r] (with axes of its own before r) or B [e r out] of a weight."""
    inward, out = _native_dims(weight)
    bare = _last(weight.target.parts)
    target = ended(weight.target.parts, f"{NATIVE[bare]}_{matrix}", drop=bare)
    e = (_experts(weight),)
    axes = (e, inward, *own, ("r",)) if matrix == "A" else (e, ("r",), out)
    source = replace(source, parts=_anywhere(source.parts))
    made = interned(source, Address(_anywhere(target), axes))
    return replace(made, bounds=tuple(b for b in weight.bounds if b[0] in made.letters))


def _one_by_one(rules: Iterable[Rule]) -> Iterator[Rule]:
    """The weight rules of experts one by one under the native prefix, where a family has none of its own."""
    for rule in rules:
        inward, out = _native_dims(rule)
        bare = _last(rule.target.parts)
        stem: Parts = (*ended(rule.target.parts, "", drop=bare), Capture(_experts(rule)), ".")
        gates = Capture("g", ("gate_proj", "up_proj"))
        name: Parts = ("down_proj",) if bare == "down_projs" else (gates,) if "g" in out else ("up_proj",)
        axes = (tuple(a for a in out if a != "g"), inward)
        yield interned(
            Address(merged((*stem, *name, ".weight")), axes), rule.target, tuple(b for b in rule.bounds if b[0] != "g")
        )


def _wrapper(rule: Rule) -> Wrapper:
    parameter = _last(rule.source.parts)
    return Wrapper(rule, ended(rule.source.parts, "", drop=f".{parameter}"), parameter)


def takes_last(version: str, marked: bool) -> bool:
    """Whether lora_A takes the last dimension of a 3-D parameter, and lora_B the one before: PEFT's releases differ.

    Up to 0.18 none asked what the dimensions mean; 0.19.0 asked, and took the wrong one; 0.19.1 put that right.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    if not found:
        raise AdapterError(f"peft_version is {brief(version)}, expected a release such as {CURRENT!r}")
    at = tuple(int(n or 0) for n in found.groups())
    if "dev" in version and at in ((0, 18, 2), (0, 19, 1)):
        text = f"peft_version {version!r} may be from before or after a change in how lora_A and lora_B lie"
        raise AdapterError(f"{text}: say which release it is like, as peft_version='0.18.1', '0.19.0' or '0.19.1'")
    return False if at < (0, 19, 0) else marked if at == (0, 19, 0) else not marked


def _native_dims(rule: Rule) -> tuple[Dim, Dim]:
    _, inward, out = rule.target.axes or ()
    return inward, out


def _experts(rule: Rule) -> str:
    """The letter that counts experts: the first native axis; `e`, but for a second tower."""
    return (rule.target.axes or (("e",),))[0][0]


def part(rule: Rule) -> str:
    """Which LoRA pair a weight rule belongs to: "gate_and_up" or "down"."""
    return NATIVE[_last(rule.target.parts)].removeprefix("lora_")


def _last(parts: Parts) -> str:
    return str(parts[-1]).rpartition(".")[2]


def ended(parts: Parts, suffix: str, drop: str = "") -> Parts:
    """The parts with another end."""
    *rest, last = parts
    return merged((*rest, last, suffix) if isinstance(last, Capture) else (*rest, last.removesuffix(drop) + suffix))


def _anywhere(parts: Parts) -> Parts:
    """The same below any prefix: `mtp.layers.{l}.` and `{pre=model.|}layers.{l}.` are `{pre}layers.{l}.`."""
    first = parts[0]
    if isinstance(first, Capture) and not first.choices and len(first.name) > 1:
        return parts
    rest = parts[1:] if isinstance(first, Capture) else parts
    head = (text := str(rest[0])).rstrip(".").rpartition(".")[0]
    return (Capture("pre"), text[len(head) + 1 if head else 0 :], *rest[1:])


def merged(parts: Iterable[str | Capture]) -> Parts:
    """Neighbouring texts as one; no empty ones."""
    made: list[str | Capture] = []
    for part in parts:
        if isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        elif part != "":
            made.append(part)
    return tuple(made)
