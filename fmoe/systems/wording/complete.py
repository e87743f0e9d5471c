"""A stage that changes nothing, and sees what no rule sees: a hole in what names count."""

import re
from dataclasses import dataclass

from fmoe.codecs import CodecPlan
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.systems.wording.stages import Stateless
from fmoe.types import AdapterError, Problem

_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Complete(Stateless):
    """x <-> x, where every expert of a layer has what another has: a rule that only renames sees no hole."""

    lossless: bool = True

    @property
    def inverse(self) -> "Complete":
        return self

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        layers: dict[str, dict[str, set[int]]] = {}
        for name in specs if "e" not in window else ():
            if found := _EXPERT.fullmatch(name):
                layers.setdefault(found[1], {}).setdefault(found[3], set()).add(int(found[2]))
        absent = []
        for layer, parts in layers.items():
            every = range(max(max(there) for there in parts.values()) + 1)
            absent += [f"{layer}{e}{part}" for part, there in parts.items() for e in every if e not in there]
        if absent:
            raise AdapterError(
                [Problem(f"missing {some(absent)}: other experts of the layer have them", tuple(absent))]
            )
        return CodecPlan(dict(specs), (), str(self))

    def __str__(self) -> str:
        return "complete: every expert of a layer has the tensors that another has"
