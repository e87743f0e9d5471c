"""The stage that is a table of weights with LoRA tensors beside them: whichever form these have in files.

No rule for weights, and no codec, ever touches a LoRA tensor: names with a segment `lora_...` are set apart, expert
matrices among them go through the derived rules, and all others pass unchanged.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, equal

from fmoe.folding import meant
from fmoe.layout.entries import Entry, Keep, settle
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.layout.notation import Rule
from fmoe.layout.plan import TablePlan, plan_table
from fmoe.layout.spelled.alias import Alias
from fmoe.layout.stage import Stage
from fmoe.layout.table import Table
from fmoe.lowrank.derive import CURRENT, Forms, derive, shared
from fmoe.lowrank.pairs import Pair, pairs_of
from fmoe.lowrank.sorting import Job, Sorted, paired, sort_files, sort_native, sort_pairs, twins, unread
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Problem, bits

FORMS = ("peft", "per-expert")
_LORA = re.compile(r"(^|\.)lora_\w+(\.|$)")


def is_lora(name: str) -> bool:
    """Whether a name, of a file or ours, is that of a LoRA tensor: one of its segments begins with `lora_`.

    >>> is_lora("model.layers.0.self_attn.q_proj.lora_A.weight"), is_lora("experts.lora_down_A"), is_lora("q_lora.w")
    (True, True, False)
    """
    return bool(_LORA.search(name))


UNWRAPPED = {"longcat_flash": "its gate_up_proj holds the zero experts too, and its down_proj does not"}
"""Model types whose experts PEFT cannot wrap one by one, whatever their rules say, and why."""
UNMARKED = {"llama4", "llama4_text"}
"""Model types whose parameters are [experts, in, out], and whose module does not say so (`is_transposed`) to PEFT."""


def carry(
    stages: Iterable[Stage],
    model_types: Iterable[str],
    peft_version: str | None = None,
    target_parameters: Iterable[str] | None = None,
    lora_r: int | None = None,
) -> tuple[Stage, ...]:
    """The stages of a family, its tables carrying LoRA tensors. Other arguments are what adapter_config.json says.

    lora_r: the rank of all, where it has to be told: PEFT's form has experts times ranks in one dimension, and the
    number of experts is mostly the config's.
    """
    if isinstance(target_parameters, str):
        raise AdapterError(f"target_parameters is {target_parameters!r}, expected names, as in adapter_config.json")
    types = set(model_types)
    why = next((UNWRAPPED[t] for t in types & UNWRAPPED.keys()), "")
    targets = None if target_parameters is None else tuple(sorted(target_parameters))
    made: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Table):
            forms = derive(stage.entries, why, marked=not types & UNMARKED)
            forms = replace(forms, rank=lora_r, joined=any(s.pairs for s in made if isinstance(s, LoraTable)))
            forms.peft(peft_version or CURRENT, "both")
            stage = LoraTable(stage.entries, forms, version=peft_version or CURRENT, targets=targets)
        made.append(stage)
    return tuple(made)


@dataclass(frozen=True)
class LoraPlan(TablePlan):
    """The plan of a table with LoRA tensors beside it: as many aliases as experts, found at once."""

    def _aliased(self, names: list[str], flipped: bool) -> list[str]:
        return [alias for n in names for alias in self._beside[flipped].get(n, ())]

    @cached_property
    def _beside(self) -> dict[bool, dict[str, list[str]]]:
        found: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
        for alias in self.aliases:
            found[alias.flipped].setdefault(alias.of, []).append(alias.name)
        return found


@dataclass(frozen=True)
class LoraTable(Table):
    """A table, and the LoRA forms derived from it.

    form: "peft" or "per-expert"; None: what the names say, else PEFT's. version: the PEFT release whose orientation
    counts. targets: `target_parameters` of adapter_config.json, which alone says what a single wrapper wraps.
    shared: whether gate and up have one matrix A in the per-expert form; None: what the values say, else one.
    """

    forms: Forms = Forms()
    form: str | None = None
    version: str = CURRENT
    targets: tuple[str, ...] | None = None
    shared: bool | None = None
    flipped: bool = False
    heard: bool = field(default=False, compare=False, repr=False, kw_only=True)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        return pairs_of(super().inverse.entries if self.flipped else self.entries)

    @property
    def inverse(self) -> "LoraTable":
        return replace(self, entries=super().inverse.entries, flipped=not self.flipped)

    def bind(self, sizes: Mapping[str, int | Iterable[int]]) -> "LoraTable":
        return replace(self, entries=super().bind(sizes).entries, forms=self.forms.bind(sizes))

    def resolve(self, names: Names, *, default: bool) -> "LoraTable":
        mine, others = _apart(names)
        entries = settle(self.entries, others, default=default)
        if not mine.names or self.flipped:
            return self if entries == self.entries else replace(self, entries=entries)
        return replace(self, entries=entries, form=self.form or self._sorted(mine, {}).form)

    def choices(self) -> dict[str, tuple[str, ...]]:
        known = FORMS if self.forms.wrappers else FORMS[1:]
        found = super().choices() | ({"lora": known} if self.form is None and self.forms.per_expert else {})
        apart = not self.forms.joined and any(shared(rule) != rule for rule in self.forms.per_expert)
        return found | ({"lora_A": ("shared", "separate")} if self.shared is None and apart else {})

    def choose(self, choices: Mapping[str, Any]) -> "LoraTable":
        if not self.forms.per_expert:
            return replace(self, entries=super().choose(choices).entries)
        form = choices.get("lora", self.form)
        if form not in (None, *FORMS):
            raise AdapterError(f"lora={form!r}: expected one of {', '.join(map(repr, FORMS))}{meant(form, FORMS)}")
        if form == "peft" and not self.forms.wrappers:
            raise AdapterError(f"lora='peft': PEFT cannot wrap these experts: {self.forms.no_peft}; use 'per-expert'")
        alike = {"shared": True, "separate": False}.get(choices.get("lora_A", ""), self.shared)
        if choices.get("lora_A", "shared") not in ("shared", "separate"):
            raise AdapterError(f"lora_A={choices['lora_A']!r}: expected 'shared' or 'separate'")
        return replace(self, entries=super().choose(choices).entries, form=form, shared=alike)

    def see(self, values: Mapping[str, Any]) -> "LoraTable":
        """Where the form leaves it open, the values say whether gate and up have one matrix A: bit for bit equal."""
        names = [n for n in values if isinstance(n, str) and n.endswith(".lora_A.weight")]
        if self.shared is not None or self.flipped or not names:
            return self
        mine, _ = _apart(Names(names))
        both = [(values[n], values[of]) for n, of in twins(self.forms.per_expert, mine).items() if of in values]
        if not both or not all(isinstance(t, Tensor) and not t.is_meta and not is_dtensor(t) for p in both for t in p):
            return self
        alike = all(a.shape == b.shape and a.dtype == b.dtype and equal(bits(a), bits(b)) for a, b in both)
        return replace(self, shared=alike)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> TablePlan:
        mine, others = _apart(names)
        if not mine.names:
            return super().plan(specs, names, window, local)
        problems: list[Problem] = []
        plans: list[TablePlan] = []
        found = self._sorted(mine, specs)
        problems += found.problems
        jobs = [Job(self.entries, others.names), *found.jobs, Job(self._rest(), found.rest)]
        for job in jobs:
            try:
                plans += [self._planned(job, specs, window, local)] if job.names else []
            except AdapterError as error:
                problems += error.found if self.flipped else unread(error.found, self.forms)
        targets = {t: spec for plan in plans for t, spec in plan.targets.items()}
        problems += [] if problems else list(paired(specs if self.flipped else targets, plans))
        if problems:
            raise AdapterError(dict.fromkeys(problems))
        return LoraPlan(
            specs,
            tuple(g for plan in plans for g in plan.groups),
            {s: t for plan in plans for s, t in plan.pairs.items()},
            targets,
            tuple(a for plan in plans for a in plan.aliases),
            tuple(d for plan in plans for d in plan.dropped),
        )

    def rename(self, names: Names) -> list[str]:
        mine, others = _apart(names)
        found = self._sorted(mine, {}) if mine.names else Sorted()
        made = [n for job in found.jobs for n in Table(job.entries).rename(Names(job.names))]
        made += [n for j in found.jobs if j.pair for n in j.pair.seconds(Names(j.names), self.flipped)]
        return super().rename(others) + made + found.rest

    def claimed(self, names: Names) -> list[str]:
        mine, others = _apart(names)
        found = self._sorted(mine, {}) if mine.names else Sorted()
        return super().claimed(others) + [n for job in found.jobs for n in job.names]

    def kept(self, names: Names) -> dict[str, bool]:
        gone = set(self.claimed(names))
        return super().kept(Names([n for n in names.names if n not in gone]))

    def __str__(self) -> str:
        lines = [super().__str__()]
        for form in (self.form,) if self.form else self.choices().get("lora", ()):
            rules = self.forms.peft(self.version, "both") if form == "peft" else self.forms.per_expert
            lines += [f"lora = {form}:", *(f"    {r.inverse if self.flipped else r}" for r in rules)]
        return "\n".join(lines)

    def _sorted(self, mine: Names, specs: Specs) -> Sorted:
        if self.flipped:
            found = sort_native(self.forms, mine, specs, self.form, self.version)
        else:
            found = sort_files(self.forms, mine, self.form, self.version, self.targets)
        return sort_pairs(self.pairs, found, self.form, self.flipped)

    def _rest(self) -> tuple[Entry, ...]:
        """What keeps LoRA tensors that are no expert's: beside the rules, so that what looks like one is refused."""
        rules = [r.inverse if self.flipped else r for r in self.forms.per_expert]
        return (*rules, *(e for e in self.entries if isinstance(e, Keep)))

    def _planned(self, job: Job, specs: Specs, window: Window, local: frozenset[str]) -> TablePlan:
        """A job's plan. With one A for gate and up, the tensor under up's name is an alias of that under gate's."""
        again = job.pair.aliases(Names(job.names), self.flipped) if job.pair else []
        names = [n for n in job.names if n not in {a.name for a in again}]
        plan = plan_table(job.entries, specs, Names(names), window, local, self.guards)
        if job.pair:
            more = {a.name: plan.targets[a.of] for a in again if a.flipped and a.of in plan.targets}
            return replace(plan, aliases=tuple(again), targets=plan.targets | more)
        if not job.twins or not self.flipped and self.shared is False:
            return plan
        if self.flipped:
            made = twins(self.forms.per_expert, Names(plan.targets), of_gates=True)
            targets = plan.targets | {up: plan.targets[gate] for up, gate in made.items()}
        elif made := twins(self.forms.per_expert, Names([n for sources, _ in plan.units() for n in sources])):
            ups = twins(self.forms.per_expert, Names(job.names))
            gates = [n for n in job.names if n not in ups]
            rules = tuple(shared(r) if isinstance(r, Rule) else r for r in job.entries)
            plan = plan_table(rules, specs, Names(gates), window, local, self.guards)
            targets = plan.targets
        aliases = tuple(Alias(up, gate, self.flipped) for up, gate in made.items())
        return replace(plan, aliases=aliases, targets=targets) if made else plan


def _apart(names: Names) -> tuple[Names, Names]:
    """LoRA names, and all others."""
    mine = {n for template, rows in names.rows.items() if is_lora(template) for n in rows.names}
    if not mine:
        return Names([]), names
    part = lambda ours: Names([n for n in names.names if (n in mine) == ours], names.specs)
    return part(True), part(False)
