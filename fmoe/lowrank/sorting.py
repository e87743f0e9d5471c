"""Which LoRA tensors lie in which form, by their names alone; and what must hold between those of one expert layer."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fmoe.layout.claims import some
from fmoe.layout.entries import Entry
from fmoe.layout.grouping import Specs
from fmoe.layout.names import Names, hits, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.plan import TablePlan
from fmoe.lowrank.derive import NATIVE, Forms, part, shared
from fmoe.lowrank.pairs import Pair
from fmoe.types import AdapterError, Problem

WRAPPED = "base_model.model."
"""What PEFT puts before every name."""
END = re.compile(r"\.lora_[AB]\.weight$")
OURS = {f"{stem}_{m}": (stem.removeprefix("lora_"), m) for stem in NATIVE.values() for m in "AB"}
_ASK = "pass target_parameters= as in its adapter_config.json, or load the directory with fmoe.lora.load"


class Job(NamedTuple):
    """Names, and the entries that they go through, those of a pair. twins: gate and up have one matrix A."""

    entries: tuple[Entry, ...]
    names: list[str]
    twins: bool = False
    pair: Pair | None = None


@dataclass
class Sorted:
    """form: the one that the names speak for. rest: LoRA tensors that are no expert's."""

    jobs: list[Job] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    form: str | None = None
    problems: list[Problem] = field(default_factory=list)


def sort_files(forms: Forms, mine: Names, form: str | None, version: str, targets: tuple[str, ...] | None) -> Sorted:
    """The jobs of LoRA names as files have them. Raises AdapterError for both forms at once."""
    single, wrapped = _hit(forms.per_expert, mine), _hit(forms.peft(version, "both"), mine)
    if single and wrapped:
        keys = next(iter(single)), next(iter(wrapped))
        text = f"two forms of LoRA at once: {keys[0]!r} is per expert, {keys[1]!r} is PEFT's of all experts"
        raise AdapterError([Problem(text, keys)])
    found = Sorted(rest=[n for n in mine.names if n not in single and n not in wrapped])
    found.form = "per-expert" if single else "peft" if wrapped else None
    if form not in (None, found.form) and found.form:
        names = tuple(single or wrapped)
        found.problems.append(Problem(f"{some(names)}: the form {found.form!r}, and lora={form!r} was chosen", names))
    if single and (alone := _half(forms.per_expert, Names(single))):
        found.problems += alone
    elif single:
        found.jobs.append(Job(forms.per_expert, [*single], twins=True))
    if not forms.nested:
        found.jobs += [Job(forms.peft(version, "both"), [*wrapped])] if wrapped else []
        return found
    modules: dict[str, list[str]] = {}
    for name in wrapped:
        modules.setdefault(END.sub("", name).removesuffix(".base_layer"), []).append(name)
    kinds: dict[str, list[str]] = {}
    for module, held in modules.items():
        kind, why = _kind(forms, module, held, targets)
        kinds.setdefault(kind, []).extend(held)
        found.problems += [Problem(f"{some(held)}: {why}", tuple(held))] if why else []
    found.jobs += [Job(forms.peft(version, kind), names) for kind, names in kinds.items() if kind]
    return found


def sort_native(forms: Forms, mine: Names, specs: Specs, form: str | None, version: str) -> Sorted:
    """The jobs of native LoRA names, towards a form; None: PEFT's, where it can wrap the family's experts."""
    found = Sorted(form=form or ("peft" if forms.wrappers else "per-expert"))
    ours = [n for n in mine.names if n.rpartition(".")[2] in OURS]
    found.rest = [n for n in mine.names if n.rpartition(".")[2] not in OURS]
    own = [n for n in ours if n.endswith("gate_and_up_A") and n in specs and len(specs[n].shape) == 4]
    if found.form == "per-expert":
        plain = [n for n in ours if n.endswith("gate_and_up_A") and n not in own]
        if own and plain:
            text = f"{own[0]!r} is [E, D, 2, r] and {plain[0]!r} is [E, D, r]: expected all of one kind"
            found.problems.append(Problem(text, (own[0], plain[0])))
        if own and forms.joined:
            text = f"{some(own)}: [E, D, 2, r], and files have gate and up in one matrix, with one A for both."
            text += " Fix: fmoe.lora.lift(params) is exact with rank 2r"
            found.problems.append(Problem(text, tuple(own)))
        rules = tuple(r.inverse if own else shared(r).inverse for r in forms.per_expert)
        jobs = [(rules, ours, not own)]
    else:
        if own:
            text = f"{some(own)}: [E, D, 2, r], gate and up with matrices A of their own, for which PEFT's form has no"
            text += " room: fmoe.lora.lift(params) is exact with rank 2r; or write lora='per-expert'"
            found.problems.append(Problem(text, tuple(own)))
        layers: dict[str, list[str]] = {}
        for name in ours:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        kinds: dict[str, list[str]] = {}
        for names in layers.values():
            parts = {OURS[n.rpartition(".")[2]][0] for n in names}
            kinds.setdefault("both" if len(parts) > 1 or not forms.nested else parts.pop(), []).extend(names)
        jobs = [(tuple(r.inverse for r in forms.peft(version, k)), names, False) for k, names in kinds.items()]
    for rules, names, has_twins in jobs:
        known = _hit(rules, Names(names))
        if lost := tuple(n for n in names if n not in known):
            found.problems.append(Problem(f"{some(lost)}: the family has no {found.form} form for it", lost))
        found.jobs += [Job(rules, [*known], has_twins)] if known else []
    return found


def sort_pairs(pairs: Iterable[Pair], found: Sorted, form: str | None, flipped: bool) -> Sorted:
    """What is left, with the LoRA of matrices of gate and up in jobs of their own; of the form "apart" in none."""
    for pair in pairs:
        halves = pair.hit(Names(found.rest), True)
        joined = halves if flipped else pair.hit(Names(found.rest), False)
        if not flipped and joined and halves:
            text = f"two forms of LoRA at once: {joined[0]!r} is of gate and up together, {halves[0]!r} of one"
            found.problems.append(Problem(text, (joined[0], halves[0])))
        elif joined and form != "apart":
            found.jobs.append(Job(pair.rules(flipped)[:2], joined, pair=pair))
            found.rest = [n for n in found.rest if n not in {*joined}]
        elif halves:
            found.form = "apart"
    return found


def unread(problems: Iterable[Problem], forms: Forms) -> list[Problem]:
    """The problems, those of experts' LoRA that no rule claims as one, which says what to do."""
    theirs = [p for p in problems if "no rule claims it" in p.text and any(".experts." in k for k in p.keys)]
    if not (keys := tuple(dict.fromkeys(k for p in theirs for k in p.keys))):
        return [*problems]
    why = "" if forms.wrappers else f" (PEFT's wrapper of all: {forms.no_peft})"
    text = f"{some(keys)}: LoRA of experts in no form that has a rule{why}. Fix: merge it with PEFT"
    told = Problem(f"{text} (merge_and_unload), write that by save_pretrained, and load it", keys)
    return [*(p for p in problems if p not in theirs), told]


def twins(rules: Iterable[Rule], names: Names, *, of_gates: bool = False) -> dict[str, str]:
    """Matrices A of up, as they are named -> those of gate: of the ups among the names, or of the gates."""
    made: dict[str, str] = {}
    for rule in (r for r in rules if shared(r) != r):
        g, there = next(n for n in rule.stacked if rule.source.captures[n].choices), patterns(rule)[0]
        captures = tuple(rule.source.captures)
        for _, hit, rows in hits(rule, names):
            for name, values in zip(rows.names, hit.values(captures, rows), strict=True):
                at = dict(zip(captures, values, strict=True))
                if of_gates and at[g] == 0:
                    made[there.render(at | {g: 1})] = name
                elif not of_gates and at[g] == 1:
                    made[name] = there.render(at | {g: 0})
    return made


def _half(rules: Iterable[Rule], names: Names) -> list[Problem]:
    """What there is to say where all experts have matrices of gate alone, or of up; and each that is missing."""
    of_ups, of_gates = (twins(rules, names, of_gates=which) for which in (False, True))
    ours, others = ([*of_ups], [*of_ups.values()]) if of_ups else ([*of_gates.values()], [*of_gates])
    if not ours or (of_ups and of_gates) or {*map(_other, others)} & {*names.names}:
        return []
    mine, other = (END.sub("", n).rpartition(".")[2] for n in (ours[0], others[0]))
    text = f"{some(ours)}: LoRA of {mine!r} without {other!r}, and natively these are one matrix"
    fix = f"fmoe.lora.load reads it of a directory whose config targets {mine!r} alone; or beside each, "
    fix += f"{others[0]!r} equal to {mine!r}'s and its lora_B of zeros are the same update"
    told = Problem(f"{text}. Fix: {fix}; name {other!r} in target_modules too", (*ours,))
    return [told, *(Problem(f"{n!r}: missing", (n,)) for o in others for n in (o, _other(o)))]


def paired(native: Specs, plans: Iterable[TablePlan]) -> Iterator[Problem]:
    """Matrices A and B come together, with one rank and as many experts; and alike in all layers, but for the rank."""
    groups = [g for plan in plans for g in plan.groups]
    made = {t: g.sources for g in groups for t in g.targets if t in native}
    prefix = lambda g: (str(v) for n, v in g.shared.items() if not g.rule.indexed(n))  # thinker, talker
    towers = {n: (str(g.rule), *prefix(g)) for g in groups for n in (*g.targets, *g.sources)}
    usual: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}
    for name in (n for n in native if n.rpartition(".")[2] in OURS):
        stem, matrix = name[:-1], name[-1]
        shape, other = native[name].shape, stem + ("B" if matrix == "A" else "A")
        keys = tuple(made.get(name, [name]))
        if other not in native:
            absent = tuple(map(_other, keys))
            yield Problem(f"{some(keys)}: stands without {some(absent)}", (*keys, *absent))
            continue
        rank, theirs = (native[n].shape[-1 if n.endswith("_A") else 1] for n in (name, other))
        if matrix == "A" and (rank != theirs or shape[0] != native[other].shape[0]):
            both = (*keys, *made.get(other, [other]))
            text = f"rank {rank} of {shape[0]} experts, and {theirs} of {native[other].shape[0]} in {other!r}"
            yield Problem(f"{some(keys)}: {text}", both)
        if matrix == "A" and native[name].dtype != native[other].dtype:
            text = f"{native[name].dtype}, and {native[other].dtype} in {other!r}: expected one dtype"
            yield Problem(f"{some(keys)}: {text}", (*keys, *made.get(other, [other])))
        fixed = shape[:-1] if matrix == "A" else (shape[0], *shape[2:])
        near, expected = usual.setdefault(towers[name], (name, fixed))
        if fixed != expected:
            text = f"{list(fixed)} but for the rank, where {near!r} has {list(expected)}"
            yield Problem(f"{some(keys)}: {text}", keys)


def _hit(rules: Iterable[Rule], names: Names) -> dict[str, None]:
    return dict.fromkeys(n for rule in rules for _, _, rows in hits(rule, names) for n in rows.names)


def _kind(forms: Forms, module: str, names: list[str], targets: tuple[str, ...] | None) -> tuple[str, str]:
    """Which of a module's parameters are wrapped, or "" and why nobody can say."""
    inner = any(END.sub("", n).endswith(".base_layer") for n in names)
    if targets is None:
        return ("both", "") if inner else ("", f"one wrapper, around which parameter no name says: {_ASK}")
    key = module.removeprefix(WRAPPED)
    named = {t.rpartition(".")[2] for t in targets if f"{key}.".endswith(f".{t.rpartition('.')[0]}.") or "." not in t}
    named |= {t.rpartition(".")[2] for t in targets if t.rpartition(".")[0] == key}
    parameters = {w.parameter: part(w.weight) for w in forms.wrappers}
    told = f"target_parameters {sorted(targets)}"
    if strange := {n for n in named - parameters.keys() if n.endswith("_bias")}:
        return "", f"{told} wrap {', '.join(sorted(strange))} too, which fmoe has no LoRA matrices for"
    parts = {parameters[n] for n in named if n in parameters}
    if inner != (len(parts) == 2) or not parts:
        found = "two wrappers" if inner else "one wrapper"
        return "", f"{found}, and {told} name {', '.join(sorted(parts)) or 'none'} of its parameters"
    return ("both", "") if inner else (parts.pop(), "")


def _other(name: str) -> str:
    """The name of B beside that of A, and the other way round, in a file or natively."""
    swapped = {"A": "B", "B": "A"}
    if END.search(name):
        stem = name.removesuffix(".weight")
        return f"{stem[:-1]}{swapped[stem[-1]]}.weight"
    return name[:-1] + swapped[name[-1]]
