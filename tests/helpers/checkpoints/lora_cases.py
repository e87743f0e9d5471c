"""Native LoRA matrices of every family, drawn, and the adapters for them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

import fmoe
from fmoe.families import FAMILIES
from fmoe.layout.names import patterns
from fmoe.lowrank.derive import CURRENT
from fmoe.lowrank.targets import table_of

SIZES = dict(E=3, D=10, I=7, r=2)
PREFIX = "base_model.model.model."


def sized(name: str, E: int, D: int, I: int, **_: int) -> dict[str, Any]:
    """A config that says these sizes under the family's own names."""
    fields, sizes = FAMILIES[name].fields, dict(n_routed_experts=E, dim=D, moe_inter_dim=I, n_activated_experts=2)
    sizes |= {"moe_latent_size": D} if FAMILIES[name].fixed.get("latent_norm") else {}
    said = {fields[f].split()[0]: n for f, n in sizes.items() if f in fields}
    return {f.partition(".")[0]: [n, n] if "." in f else n for f, n in said.items()}


@cache
def adapter_of(name: str, **choices: Any) -> fmoe.Adapter:
    return FAMILIES[name].adapter(sized(name, **SIZES), **{"lora_r": SIZES["r"]} | choices)


def forms(name: str) -> list[str]:
    return ["peft", "per-expert"] if table_of(adapter_of(name)).forms.wrappers else ["per-expert"]


def kinds(name: str) -> tuple[bool, ...]:
    """Whether gate and up have matrices A of their own: where files hold both as one matrix they have not."""
    return (False, True) if "lora_A" in table_of(adapter_of(name)).choices() else (False,)


@cache
def stems(name: str, form: str = "per-expert") -> tuple[tuple[str, bool], ...]:
    """The native prefixes that a form of a family's LoRA matrices goes to, for layer 3; and whether they are gated."""
    table = table_of(adapter_of(name))
    rules = table.forms.peft(CURRENT, "both") if form == "peft" else table.forms.per_expert
    found: dict[str, bool] = {}
    for rule in rules:
        pattern = patterns(rule)[1]
        if pattern.address.name.endswith("lora_gate_and_up_B"):
            values = {n: PREFIX if n == "pre" else 3 for n in pattern.address.captures}
            found[pattern.render(values).rpartition(".")[0]] = "g" in pattern.address.atoms
    return tuple(found.items())


def native(name: str, form: str = "per-expert", apart: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Drawn native LoRA matrices. apart: gate and up with matrices A of their own."""
    E, D, I, r = SIZES.values()
    made = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {f"{PREFIX}layers.3.self_attn.q_proj.lora_A.weight": torch.randn(r, D, generator=made)}
    for stem, gated in stems(name, form):
        shapes = {
            "gate_and_up_A": (E, D, 2, r) if apart and gated else (E, D, r),
            "gate_and_up_B": (E, r, I * (1 + gated)),
        }
        shapes |= {"down_A": (E, I, r), "down_B": (E, r, D)}
        found |= {f"{stem}.lora_{n}": torch.randn(s, generator=made) for n, s in shapes.items()}
    return found
