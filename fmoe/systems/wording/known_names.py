"""A stage that changes nothing, and refuses what the family's class in Transformers has in none of its forms."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fmoe.codecs import CodecPlan
from fmoe.families.known import class_names, known
from fmoe.families.numbered import NUMBERED
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names, hits
from fmoe.layout.notation import Rule
from fmoe.systems.wording.stages import Stateless
from fmoe.types import AdapterError, Problem

_BESIDE = re.compile(
    r"\bmtp|nextn|vision|visual|audio|resampler|projector|merger|\.(enorm|hnorm|eh_proj|e_proj|h_proj|shared_head|embed_tokens)\."
    r"|(inv_freq|freqs_cis|_extra_state\w*)$"
)
"""What Transformers' class may leave out: layers that predict further tokens, towers, what a model makes anew."""
_SCALE = re.compile(r"_scale\w*$")


@dataclass(frozen=True)
class KnownNames(Stateless):
    """x <-> x, where every native name is of a module that the model type's class has.

    A class that is not known passes all, and so does a model that has hardly any of the class's names: another's.
    architecture: the class that the config names, if any. after: rules of what comes next: what one claims passes.
    """

    model_type: str
    architecture: str | None = None
    after: tuple[Rule, ...] = ()
    lossless: bool = True

    @property
    def inverse(self) -> "KnownNames":
        return self

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        entry = known().get(self.model_type)
        if entry is not None and self.architecture in (None, entry["class"]):
            odd = self._claimed_by_none(_strangers(specs, entry["forms"]))
            if odd and 2 * len(odd) < len(specs):
                text = f"{some(odd)}: no rule claims it, and {entry['class']} has no such parameter"
                raise AdapterError([Problem(f"{text}. Fix: leave it out of what is converted", odd)])
        return CodecPlan(dict(specs), (), str(self))

    def _claimed_by_none(self, names: list[str]) -> tuple[str, ...]:
        """Those that no rule of what comes next claims, a scale as the tensor that it is of."""
        plain = {n: _SCALE.sub("", n) for n in names}
        there = Names(list(dict.fromkeys([*plain, *plain.values()])))
        claimed = {n for rule in self.after for _, _, rows in hits(rule, there) for n in rows.names}
        return tuple(n for n in names if claimed.isdisjoint((n, plain[n])))

    def __str__(self) -> str:
        return f"known: names of modules that {self.model_type} has"


def _strangers(names: Iterable[str], forms: Any) -> list[str]:
    """The names that lie in no module of the class, in none of its forms."""
    inside, tails = class_names(forms)
    modules, bare = _modules(inside), tuple("." + m for m in _modules(set(tails)))
    return [n for n in names if not _BESIDE.search(n) and not _held(n, modules, bare)]


def _modules(names: set[str]) -> set[str]:
    """Names without what says which parameter of a module it is; of stacks of experts, where they lie."""
    return {re.sub(r"\.(weight|bias|gate_and_up_projs|down_projs)$", "", n) for n in names}


def _held(name: str, modules: set[str], bare: tuple[str, ...]) -> bool:
    hit = NUMBERED.match(name)
    if hit is None:
        return any(f"{m}." in f".{name}." or f"{m}_" in f".{name}" for m in bare)
    parts = hit[3].split(".")
    return any(".".join(parts[:k]) in modules for k in range(1, len(parts) + 1)) or any(
        hit[3].startswith(m + "_") for m in modules
    )
