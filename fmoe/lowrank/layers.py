"""What is known of a model's class tells: layers that lack what others of their kind have, and what is a stack."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fmoe.families import FAMILIES, opened
from fmoe.families.defaults import layers_with_experts
from fmoe.families.known import known, rules_of, with_text
from fmoe.families.numbered import BESIDE, NUMBERED
from fmoe.families.sparse import ANY, layer_count, sparse_layers
from fmoe.families.spelling import alike, spelt
from fmoe.families.surplus import known_ranks
from fmoe.families.where import settled, translated
from fmoe.layout.adapter import Adapter
from fmoe.lowrank.complete import SINGLE, STACKED
from fmoe.lowrank.config import LoraConfig
from fmoe.lowrank.matrices import matrices
from fmoe.lowrank.sorting import WRAPPED
from fmoe.lowrank.targets import native, targets_of
from fmoe.types import Params, Problem

Wraps = Callable[[str], bool]
Called = Callable[[str], str | None]


class Kinds(NamedTuple):
    """Of a stack of layers: group by group the sets of names, one of which a layer has; the rules of its config."""

    groups: list[list[list[str]]]
    rules: Any
    text: bool


def lost(config: Mapping[str, Any], keys: Mapping[str, str], wraps: Wraps, called: Called) -> Iterator[str]:
    """Modules and parameters that have no matrices where every kind that their layer can be of has some.

    keys: native name of a weight -> what LoRA calls it, for each that has matrices. wraps: whether it is a target.
    called: what LoRA calls a module of its native weight. What only kinds have that a layer need not be of is no loss.

    >>> keys = {f"model.layers.{l}.self_attn.{n}_proj.weight": f"model.layers.{l}.self_attn.{n}_proj"
    ...         for l, n in ((0, "q"), (0, "o"), (2, "q"))}
    >>> wraps, called = lambda key: key.endswith(("q_proj", "o_proj")), lambda name: name.removesuffix(".weight")
    >>> [*lost({"model_type": "jamba"}, keys, wraps, called)]
    ['model.layers.2.self_attn.o_proj']
    """
    said = with_text(translated(config))
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name, key in keys.items():
        if hit := NUMBERED.match(name):
            stacks.setdefault(hit[1], {}).setdefault(int(hit[2]), {})[hit[3]] = key
    for stack, layers in stacks.items():
        for kinds in _kinds(config, stack):
            forms = {rest: (0, key) for rest, key in _modules(stack, kinds, called).items()}
            forms |= {rest: (l, key) for l, held in layers.items() for rest, key in held.items()}
            count = layer_count(said) if kinds.text else None
            for l in range(max(layers) + 1 if count is None else count):
                named = {rest: _at(key, at, l) for rest, (at, key) in forms.items()}
                wanted = {rest for rest, key in named.items() if wraps(key)}
                yield from (named[rest] for rest in _lacks(kinds, said, l, {*layers.get(l, ())}, wanted))


def _modules(stack: str, kinds: Kinds, called: Called) -> dict[str, str]:
    """What LoRA calls those of layer 0, by all that its kinds have below it, but for experts."""
    every = {n for sets in kinds.groups for s in sets for n in s}
    found = {n: called(f"{stack}.0.{n}") for n in every if n.endswith(".weight") and not STACKED.search(n)}
    return {n: key for n, key in found.items() if key is not None}


def _at(key: str, layer: int, other: int) -> str:
    """The same of another layer."""
    return key.replace(f".{layer}.", f".{other}.", 1)


def _kinds(config: Mapping[str, Any], stack: str) -> Iterable[Kinds]:
    """What is known of a stack, in the form of the class in memory."""
    for form in known().get(str(config.get("model_type")), {"forms": ()})["forms"][-1:]:
        for part in (form, *form["towers"].values()):
            if groups := part["stacks"].get(stack):
                yield Kinds(groups, rules_of(form, stack), part is form and not BESIDE.search(stack))


def _lacks(kinds: Kinds, said: Mapping[str, Any], l: int, held: set[str], wanted: Collection[str]) -> list[str]:
    """What a layer lacks: in each group what the kind with least lacks, where all that it can be of lack some."""
    every = ([sorted((s & {*wanted}) - held) for s in can] for can in _can(kinds, said, l, held))
    return [n for lacks in every if lacks and all(lacks) for n in min(lacks, key=lambda one: (len(one), one))]


def _can(kinds: Kinds, said: Mapping[str, Any], l: int, held: set[str]) -> Iterator[list[set[str]]]:
    """Group by group the sets of names, one of which a layer has, by what it holds and the config says."""
    sparse = sparse_layers(said, ANY) if kinds.text and layer_count(said) is not None else None
    for sets in kinds.groups:
        every = {n for s in sets for n in s}
        told = settled(kinds.rules, said, l, every)
        is_sparse = [any(".experts." in n for n in s) for s in sets]
        yield [
            {*s}
            for s, experts in zip(sets, is_sparse, strict=True)
            if held & every <= {*s}
            and not any(told.get(n) is False for n in s)
            and not any(there and n in every and n not in s for n, there in told.items())
            and (sparse is None or len({*is_sparse}) == 1 or experts == (l in sparse))
        ]


def nowhere(adapter: Adapter, hits: Wraps) -> bool:
    """Whether the text model has no module that hits, whatever kind its layers can be of. False: nobody knows.

    >>> import fmoe
    >>> linear = fmoe.adapter("qwen3_next", {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2})
    >>> [nowhere(linear, lambda key: key.endswith(end)) for end in ("1.self_attn.q_proj", "1.linear_attn.in_proj_ba")]
    [True, False]
    """
    model, called = adapter.config or {}, _called(adapter)
    said = with_text(translated(model))
    forms = known().get(str(model.get("model_type")), {"forms": ()})["forms"][-1:]
    for form in forms:
        root = (called(n) for n in form["root"] if n.endswith(".weight") and not BESIDE.search(n))
        if any(key and hits(key) for key in root):
            return False
        for stack, groups in form["stacks"].items():
            if BESIDE.search(stack):
                continue
            kinds = Kinds(groups, rules_of(form, stack), True)
            keys = _modules(stack, kinds, called)
            for l in range(layer_count(said) or 1):
                can = set[str]().union(*(s for sets in _can(kinds, said, l, set()) for s in sets))
                if any(hits(_at(keys[n], 0, l)) for n in can & {*keys}):
                    return False
    return bool(forms)


def sparse(config: Mapping[str, Any]) -> set[int] | None:
    """The layers with experts, as the family's configs say it. None: they do not, or it is of two stacks.

    >>> said = {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_interval": 2}
    >>> sparse({"model_type": "ernie4_5_moe"} | said)
    {1, 3}
    """
    kind = FAMILIES.get(str(config.get("model_type")))
    return layers_with_experts(config, with_text(translated(config)), kind.sparse) if kind else None


def _called(adapter: Adapter) -> Called:
    """What LoRA calls a module of its native weight: by its name in memory; None: it is none there, but a part of one.

    As gate_proj is, in a file, of what is one gate_up_proj in memory.
    """
    model, back = adapter.config or {}, opened(adapter).inverse
    ends = lambda module: module.split(".")[-2:]
    parts = [ends(n) for n in spelt().get(str(model.get("model_type")), {}).get("", ())]

    def called(name: str) -> str | None:
        file = native(back, name)
        module = alike(model, file)[-1].removesuffix(".weight") if file else ""
        return module if module and ends(module) not in parts else None

    return called


def less(params: Params, said: LoraConfig, adapter: Adapter) -> Iterator[Problem]:
    """A problem for each target that a layer lacks, by what is known of its class: no names of the base tell it."""
    whole = opened(adapter)
    keys = {t.a: t for t in targets_of(adapter, params)}
    at = {p.a: native(whole, p.weight.removeprefix(WRAPPED)) for p in matrices(params) if p.a in keys}
    held = {n: keys[a].keys[0].removeprefix(WRAPPED) for a, n in at.items() if n}
    parameters = {keys[a].keys[0].removeprefix(WRAPPED) for a, n in at.items() if keys[a].parameter}

    def wraps(key: str) -> bool:
        ends = any(f".{key}".endswith(f".{t}") for t in said.target_parameters)
        if stars(key) in forms:  # of parameters PEFT wraps those of all layers
            return ends
        told = said.target_modules != "all-linear" and last(key) not in alone
        return said.wraps(key) and (told or stars(key) in linear)

    stars = lambda key: re.sub(r"\.\d+\.", ".*.", key, count=1)
    last = lambda key: key.rpartition(".")[2]
    forms, linear = {*map(stars, parameters)}, {*map(stars, held.values())}
    alone = {last(key) for t in keys.values() for key in t.keys if SINGLE.search(key)}  # words of experts one by one
    for name in lost(adapter.config or {}, held, wraps, _called(adapter)):
        text = f"{name!r}: no matrices, and adapter_config.json targets it in all layers that have one"
        fix = "Fix: save the adapter again"
        fix += "" if stars(name) in forms else "; of some layers alone, say which in layers_to_transform"
        yield Problem(f"{text}. {fix}", (f"{WRAPPED}{name}",))


def deep(adapter: Adapter, name: str) -> int | None:
    """How many dimensions a parameter has, by any of its names in files; None: nobody knows."""
    model, whole = adapter.config or {}, opened(adapter)
    names = {n for one in alike(model, name) for n in (one, native(whole, one)) if n}
    hits = {m for n in names if (m := NUMBERED.match(n))}
    ranks = known_ranks(str(model.get("model_type")))
    forms = {*names, *(f"{path}#.{m[3]}" for m in hits for path in ("", f"{m[1]}."))}
    found = {rank for form, rank in ranks.items() if form in forms}
    return None if not found or None in found else max(rank for rank in found if rank is not None)
