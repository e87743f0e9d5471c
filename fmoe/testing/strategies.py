"""Hypothesis strategies: random rules, and the HF specs of random checkpoints that a family or any adapter takes."""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st

from fmoe.adapter import Adapter
from fmoe.build import rule
from fmoe.entries import Either, Entry, Keep, Together, walk
from fmoe.families import family
from fmoe.names import Names, Value, patterns
from fmoe.rules import Rule
from fmoe.table import Table
from fmoe.types import AdapterError, TensorSpec

Specs = dict[str, TensorSpec]

KEPT = ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "a", "visual.0.1.bias")
PREFIXES = ("", "model.", "model.language_model.", "mtp.", "base_model.model.model.")


@st.composite
def checkpoints(draw: Callable[..., Any], adapter: Adapter, dtypes: Iterable[torch.dtype] = ()) -> Specs:
    """HF specs that the adapter takes: its alternatives, layers, prefixes and axis sizes drawn, size 1 and squares too.

    dtypes: one is drawn for all tensors (default: those that hold any normal value).
    """
    dtype = draw(st.sampled_from([*dtypes] or [torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    tables = [(i, stage) for i, stage in enumerate(adapter.stages) if isinstance(stage, Table)]
    if not tables:
        raise AdapterError(f"no table of rules to draw names from in:\n{adapter}")
    last, table = tables[-1]
    specs = draw(_table(table.entries, dtype))
    for stage in reversed(adapter.stages[:last]):
        specs = Adapter((stage,)).inverse.plan(specs).targets
    return specs


@st.composite
def family_checkpoints(draw: Callable[..., Any], model_type: str, **choices: Any) -> tuple[Adapter, Specs]:
    """(adapter, HF specs) of a family: its config's sizes drawn, and a checkpoint that fits them."""
    found = family(model_type)
    sizes = {f: draw(st.integers(1, 5)) for f in ("n_routed_experts", "moe_inter_dim", "dim")} | {
        "n_activated_experts": 1
    }
    config = {found.fields[f].split()[0]: n for f, n in sizes.items()}
    adapter = found.adapter(config, **choices)
    return adapter, draw(checkpoints(adapter))


@st.composite
def rules(draw: Callable[..., Any], max_axes: int = 5) -> Adapter:
    """A random rule: letters in names or axes, on either side; composite, interleaved, chosen, of size 1, square."""
    letters = draw(st.permutations("abcdefg"))[: draw(st.integers(1, max_axes))]
    sizes = {a: draw(st.integers(1, 3)) for a in letters}
    places = {a: draw(st.sampled_from(["axis", "axis", "hf name", "native name", "both names"])) for a in letters}
    choices = {a for a in letters if places[a] != "axis" and draw(st.booleans())}

    def spell(axis: str) -> str:
        return (
            f"{{{axis}={'|'.join(axis + 'xyz'[i] for i in range(sizes[axis]))}}}" if axis in choices else f"{{{axis}}}"
        )

    def side(root: str, name: str) -> str:
        named = [a for a in letters if places[a] in (name, "both names")]
        dims: list[list[str]] = []
        axes = draw(st.permutations([a for a in letters if a not in named]))
        while axes:
            n = draw(st.integers(1, len(axes)))
            dims, axes = [*dims, axes[:n]], axes[n:]
        dims = [*dims, ["1"]] if draw(st.booleans()) else dims
        return f"{'.'.join([root, *map(spell, named)])} [{' '.join('(' + ' '.join(d) + ')' for d in dims)}]"

    return rule(side("x", "hf name"), side("y", "native name"), **sizes)


@st.composite
def _table(draw: Callable[..., Any], entries: Iterable[Entry], dtype: torch.dtype) -> Specs:
    sizes: dict[str, int] = {}
    size = lambda axis: sizes.setdefault(axis, draw(st.integers(1, 4)))
    specs: Specs = {}
    sides = [pattern for e in walk(entries) if isinstance(e, Rule) for pattern in patterns(e)]
    free = [name for name in KEPT for template in Names([name]).rows if not any(s.match(template) for s in sides)]
    for entry in _chosen(draw, entries):
        if isinstance(entry, Keep):
            names = draw(st.sets(st.sampled_from(free))) if str(entry.pattern) == "{rest}" else set()
            specs |= {n: TensorSpec((size("kept"), 2), dtype) for n in sorted(names)}
        else:
            bundle = entry.rules if isinstance(entry, Together) else (entry,)
            optional = any("scale" in str(r.source.name) or ".bias" in str(r.source.name) for r in bundle)
            for _ in range(0 if optional else draw(st.integers(0, 2))):
                shared = {n: draw(_shared(r, n)) for r in bundle for n in r.shared}
                for each in bundle:
                    specs |= _claimed(each, shared, size, dtype)
    return specs


def _chosen(draw: Callable[..., Any], entries: Iterable[Entry]) -> Iterable[Rule | Keep | Together]:
    for entry in entries:
        if isinstance(entry, Either):
            label = draw(st.sampled_from([name for name, _ in entry.options]))
            yield from _chosen(draw, entry.choose(label))
        elif isinstance(entry, Rule | Keep | Together):
            yield entry


def _shared(rule: Rule, name: str) -> st.SearchStrategy[Value]:
    capture = rule.source.captures[name]
    if capture.choices:
        return st.integers(0, len(capture.choices) - 1)
    if name in rule.bound:
        return st.sampled_from(list(rule.bound[name]))
    if rule.indexed(name):
        return st.integers(0, 3)
    return st.sampled_from(PREFIXES if rule.source.parts[0] == capture else ("x", "weight", "0.bias"))


def _claimed(rule: Rule, shared: Mapping[str, Value], size: Callable[[str], int], dtype: torch.dtype) -> Specs:
    """Every HF tensor that the rule stacks at one value of its shared captures."""
    pattern, captures = patterns(rule)[0], rule.source.captures | rule.target.captures

    def length(axis: str) -> int:
        if axis in captures and captures[axis].choices:
            return len(captures[axis].choices)
        return len(rule.bound[axis]) if axis in rule.bound else size(axis)

    here: list[dict[str, Value]] = [{n: shared[n] for n in rule.shared}]
    for axis in rule.stacked:
        here = [at | {axis: i} for at in here for i in range(length(axis))]
    axes, specs = (("x",), ("x",)) if rule.source.axes is None else rule.source.axes, {}
    for at in here:
        shape = tuple(prod(_part(rule, a, at, length) for a in dim if a != "1") for dim in axes)
        specs[pattern.render(at)] = TensorSpec(shape, dtype)
    return specs


def _part(rule: Rule, axis: str, at: Mapping[str, Value], length: Callable[[str], int]) -> int:
    """The length of an axis in one tensor: of a ragged one, the part that the tensor is, or all parts."""
    if "|" in axis:
        return sum(length(label) for label in axis.split("|"))
    if axis in rule.ragged.values():
        return length(rule.source.captures[axis].choices[int(at[axis])])
    return length(axis)
