"""What a picture of a layout shows, as data: panels of expert tensors with their axes, sizes and strides."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from fmoe.families import FAMILIES, family
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import as_adapter
from fmoe.layout.entries import Either, Entry, walk
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address
from fmoe.layout.table import Table
from fmoe.types import EXPERT_TENSORS, AdapterError, MoEConfig


@dataclass(frozen=True)
class Drawn:
    """One tensor, or one of many: its name, axes such as ("e", "d", "(g i)"), their sizes, strides in elements.

    many: how many of it one layer has (experts, gate and up); per_expert: whether its name counts experts.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    many: int
    per_expert: bool


@dataclass(frozen=True)
class Panel:
    title: str
    tensors: tuple[Drawn, ...]


def panels(adapter: Adapter) -> list[Panel]:
    """A panel for each layout of the adapter's family on disk, and one for the native layout.

    Raises AdapterError where the adapter knows no sizes (it was made without a config).
    """
    config = as_adapter(adapter).moe_config
    model_type = str((adapter.config or {}).get("model_type", ""))
    whole = family(model_type).rules if model_type in FAMILIES else adapter
    held = [n for n in EXPERT_TENSORS if config.expert_bias or not n.endswith("bias")]
    made: list[Panel] = []
    natives: dict[str, Drawn] = {}
    for title, entries in _layouts(whole):
        rules = [e for e in walk(entries) if isinstance(e, Rule) and _bare(e.target) in held]
        if rules:
            stored = {str(r.source): _drawn(r.source, r, config) for r in rules}
            made.append(Panel(title, tuple(stored.values())))
            natives |= {_bare(r.target): _drawn(r.target, r, config) for r in rules}
    if not made:
        raise AdapterError("the adapter has no rule that makes experts: there is nothing to draw")
    return [*made, Panel("native", tuple(natives[n] for n in EXPERT_TENSORS if n in natives))]


def _layouts(adapter: Adapter) -> Iterable[tuple[str, tuple[Entry, ...]]]:
    """The table of experts with each of its options chosen: (label, entries)."""
    for table in (s for s in adapter.stages if isinstance(s, Table)):
        chosen = next((e for e in table.entries if isinstance(e, Either) and "layout" in e.name), None)
        if chosen is None:
            yield "on disk", table.entries
            continue
        rest = tuple(e for e in table.entries if not isinstance(e, Either))
        for label, entries in chosen.options:
            yield label, entries + rest


def _bare(address: Address) -> str:
    return address.name.rpartition(".")[2]


def _drawn(side: Address, rule: Rule, config: MoEConfig) -> Drawn:
    gated = config.expert_activation != "relu2"
    sizes = {"e": config.n_routed_experts, "d": config.expert_dim, "i": config.moe_inter_dim, "g": 2 if gated else 1}
    known: dict[str, Any] = dict(rule.bounds) | sizes
    axes = side.axes or ()
    shape = tuple(prod(known.get(a, 1) for a in dim) for dim in axes)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    counted = [c for name, c in side.captures.items() if name in rule.stacked or name in rule.unstacked]
    many = prod([len(c.choices) or known.get(c.name, 1) for c in counted])
    written = tuple(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in axes)
    return Drawn(side.name, written, shape, strides, many, "e" in side.captures)
