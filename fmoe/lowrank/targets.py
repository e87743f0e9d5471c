"""What PEFT calls the parameters and modules that LoRA matrices adapt."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import claim
from fmoe.layout.entries import Either, Entry, Together, settle
from fmoe.layout.names import Names, hits, patterns
from fmoe.layout.table import Table
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.derive import CURRENT, takes_last
from fmoe.lowrank.matrices import matrices
from fmoe.lowrank.scales import Scales, Stack
from fmoe.lowrank.sorting import END, OURS, WRAPPED
from fmoe.lowrank.stage import LoraTable
from fmoe.types import AdapterError, Params, Problem


class Target(NamedTuple):
    """What a matrix A adapts. keys: one parameter, or modules: one, or one for each expert and projection.

    plain: a parameter that no rule stacks: PEFT's matrices of it may be of a stack, and the rank as many times r.
    """

    a: str
    rank: int
    parameter: bool
    keys: tuple[str, ...]
    plain: bool = False


def told(
    adapter: Adapter,
    version: str | None,
    targets: Iterable[str] | None,
    rank: int | None = None,
    *,
    grouped: bool = False,
) -> Adapter:
    """The adapter, with what an adapter_config.json says of LoRA tensors; what was found or chosen before is open."""
    found = None if targets is None else tuple(sorted(targets))

    def tell(stage: LoraTable) -> LoraTable:
        stage.forms.peft(version or CURRENT, "both")
        return replace(
            stage, version=version or CURRENT, targets=found, forms=replace(stage.forms, rank=rank, grouped=grouped)
        )

    return replace(adapter, stages=tuple(tell(s) if isinstance(s, LoraTable) else s for s in adapter.stages))


def ranked(adapter: Adapter, params: Params) -> Adapter:
    """The adapter, which knows the rank that all matrices A of experts have, where that is one."""
    ranks = {t.shape[-1] for n, t in params.items() if n.rpartition(".")[2] in OURS and n.endswith("_A") and t.ndim}
    if len(ranks) != 1:
        return adapter
    tell = lambda s: replace(s, forms=replace(s.forms, rank=min(ranks))) if isinstance(s, LoraTable) else s
    return replace(adapter, stages=tuple(map(tell, adapter.stages)))


def table_of(adapter: Adapter) -> LoraTable:
    """The stage that has the LoRA rules. Raises AdapterError for an adapter of no family."""
    for stage in adapter.stages:
        if isinstance(stage, LoraTable) and stage.forms.per_expert:
            return stage
    raise AdapterError("this adapter carries no LoRA matrices: expected a family's, as fmoe.adapter gives it")


def targets_of(adapter: Adapter, params: Params) -> list[Target]:
    """What every matrix A of these native parameters adapts, in the form that the adapter writes."""
    table = table_of(adapter)
    wrapped = (table.form or ("peft" if table.forms.wrappers else "per-expert")) == "peft"
    made: list[Target] = []
    for sources, names in adapter._to_hf_plan(params, None, {}).units():
        for source in sources:
            if source.rpartition(".")[2] in OURS and source.endswith("_A"):
                modules = tuple(dict.fromkeys(END.sub("", n).removeprefix(WRAPPED) for n in names if END.search(n)))
                found = (parameter(table, source),) if wrapped else modules
                made.append(Target(source, params[source].shape[-1], wrapped, found))
            elif source.endswith(".lora_embedding_A"):
                key = source.removesuffix(".lora_embedding_A").removeprefix(WRAPPED)
                made.append(Target(source, params[source].shape[0], False, (key,)))
            elif source.endswith(".lora_A.weight"):
                key = source.removesuffix(".lora_A.weight").removeprefix(WRAPPED)
                one = _held(key, table.targets or ())
                key = f"{key}.{one}" if one else key
                made.append(Target(source, params[source].shape[0], one is not None, (key,), one is not None))
    return made


def _held(module: str, targets: Iterable[str]) -> str | None:
    """The one parameter of a module that `target_parameters` wrap."""
    splits = [t.rpartition(".") for t in targets if "." in t]
    found = {last for head, _, last in splits if f".{module}".endswith(f".{head}")}
    return found.pop() if len(found) == 1 else None


def parameter(table: LoraTable, name: str) -> str:
    """The full name of the parameter that a native matrix A adapts."""
    for wrapper in table.forms.wrappers:
        rule = wrapper.naming()
        for _, hit, rows in hits(rule, Names([name])):
            (shared,) = hit.values(rule.shared, rows)
            return patterns(rule)[1].render(dict(zip(rule.shared, shared, strict=True))).removeprefix(WRAPPED)
    raise AdapterError([Problem(f"{name!r}: PEFT wraps no parameter for it", (name,))])


def scales_of(
    params: Params, config: LoraConfig, adapter: Adapter, whole: Adapter, alike: Callable[[str], Iterable[str]]
) -> Scales:
    """alpha / r of every matrix A, and which native weight, or parts of some, it adapts.

    whole: the same adapter with its layouts open: a file names modules as they are in memory, whichever its base has.
    alike: as in `Scales`.
    """
    targets = targets_of(adapter, params)
    found = {t.a: _one(t, config) for t in targets}
    mixed = interleaved(adapter, [n for n in found if n.endswith("_gate_and_up_A")])
    weights = {p.a: p.weight.removeprefix(WRAPPED) for p in matrices(params)}
    named = weights | {t.a: t.keys[0] for t in targets if t.plain}
    alone = {p.a: named[p.a] for p in matrices(params) if not p.experts}
    names, cut = renamed(adapter, named), parts(adapter, alone)
    also = {a: n for a, n in renamed(whole, named).items() if a not in cut}
    more = {a: of for a, of in parts(whole, alone).items() if a not in names}
    own = {a: n for a, n in named.items() if n != weights[a]}
    last = takes_last(config.peft_version, marked=False)
    ranks = {t.a: config.rank(t.keys[0]) for t in targets if t.plain and t.rank != config.rank(t.keys[0])}
    stacks = {a: Stack(r, last, config.grouped) for a, r in ranks.items()}
    return Scales(found, mixed, own | also | names, more | cut, alike, stacks)


def wrapped(target: Target, config: LoraConfig) -> list[str]:
    """What a config says of a target's rank and scale: of modules, those that it wraps."""
    return [k for k in target.keys if target.parameter or config.wraps(k)] or [*target.keys]


def _one(target: Target, config: LoraConfig) -> float:
    """The scale of a matrix A: experts of one layer have one."""
    scales = {config.scale(key) for key in wrapped(target, config)}
    if len(scales) > 1:
        text = (
            f"{target.a!r}: rank_pattern and alpha_pattern give its experts the scales {sorted(scales)}, expected one"
        )
        raise AdapterError([Problem(f"{text}. Fix: merge it with PEFT (merge_and_unload)", (target.a,))])
    return scales.pop()


def interleaved(adapter: Adapter, names: Iterable[str]) -> frozenset[str]:
    """The native A's among names in whose B gate and up columns alternate, as the adapter's rules have them."""
    found: set[str] = set()
    for rule in table_of(adapter).forms.per_expert:
        last = (rule.target.axes or ((),))[-1]
        if str(rule.target.parts[-1]).endswith("_B") and any(c in last[1:] for c in rule.stacked):
            for _, _, rows in hits(rule.inverse, Names([f"{n.removesuffix('A')}B" for n in names])):
                found |= {f"{n.removesuffix('B')}A" for n in rows.names}
    return frozenset(found)


def renamed(adapter: Adapter, weights: Mapping[str, str]) -> dict[str, str]:
    """A's name -> its native weight's, where that has another: LoRA tensors keep the names that they have in files.

    weights: A's name -> that of its weight in files. One that a rule turns or cuts is none that A @ B fits: it is left
    out (`parts`).

    >>> import fmoe
    >>> renamed(fmoe.adapter("mixtral", {}), {"A": "layers.0.block_sparse_moe.gate.weight"})
    {'A': 'layers.0.mlp.gate.weight'}
    """
    found = {a: (name, native(adapter, name)) for a, name in weights.items()}
    return {a: at for a, (name, at) in found.items() if at not in (None, name)}


def parts(adapter: Adapter, weights: Mapping[str, str]) -> dict[str, Callable[[Tensor], Mapping[str, Tensor]]]:
    """A's name -> what an update of its file's weight is natively, where a rule turns or cuts that weight.

    >>> import fmoe, torch
    >>> (turn,) = parts(fmoe.adapter("ernie4_5_vl_moe", {}), {"A": "layers.0.mlp.gate.weight"}).values()
    >>> turn(torch.ones(6, 4))["layers.0.mlp.text_moe.gate.weight"].shape
    torch.Size([4, 6])
    """
    return {a: partial(_through, adapter, n) for a, n in weights.items() if native(adapter, n) is None}


def _through(adapter: Adapter, name: str, update: Tensor) -> Mapping[str, Tensor]:
    alone = lambda s: replace(s, entries=tuple(_alone(s.entries))) if isinstance(s, Table) else s
    return replace(adapter, stages=tuple(map(alone, adapter.stages))).from_hf({name: update})


def _alone(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, none of which needs another beside it."""
    for entry in entries:
        if isinstance(entry, Either):
            yield replace(entry, options=tuple((label, tuple(_alone(option))) for label, option in entry.options))
        else:
            yield from entry.rules if isinstance(entry, Together) else (entry,)


def native(adapter: Adapter, name: str) -> str | None:
    """A weight's native name; None: it is turned, cut or stacked."""
    for stage in adapter.stages:
        if isinstance(stage, Table):
            names = Names([name])
            claims = claim(settle(stage.entries, names, default=True), names, guard=False)
            if claims.groups:
                return None
            name = claims.pairs.get(name, name)
    return name
