"""Hypothesis strategies: random rules, and the HF specs of random checkpoints that a family or any adapter takes."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st

from fmoe.codecs.fp8 import SUFFIX
from fmoe.entrance import held
from fmoe.families import family
from fmoe.layout.adapter import Adapter
from fmoe.layout.beside import Beside
from fmoe.layout.build import rule
from fmoe.layout.claims import claim
from fmoe.layout.entries import Drop, Entry, Keep, Together, walk
from fmoe.layout.names import Names, all_hits, hits, patterns
from fmoe.layout.notation import Rule
from fmoe.layout.planning import plan_stages
from fmoe.layout.proved.back import loose_parts
from fmoe.layout.spelled.alias import Alias, Copies
from fmoe.layout.spelled.copies import written
from fmoe.layout.stage import Stage
from fmoe.layout.table import Table
from fmoe.testing.claimed import claimed, shared
from fmoe.types import AdapterError, TensorSpec

Specs = dict[str, TensorSpec]
Stages = tuple[Stage, ...]

KEPT = ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "a", "visual.0.1.bias")
WIDTHS = ("", "", ":02", ":03")
SIZE, OFTEN, MAYBE = st.integers(1, 4), st.integers(0, 2), st.booleans()


@st.composite
def checkpoints(draw: Callable[..., Any], adapter: Adapter, dtypes: Iterable[torch.dtype] = ()) -> Specs:
    """HF specs that the adapter takes: its alternatives, layers, prefixes and axis sizes drawn, size 1 and squares too.

    Drawn are names that the rules of any stage fit, and some that its keeps and drops do, as many as all stages take in
    a row. A block may be partial, or absent: gate and up of a layer without its down, unless the rules come `together`.
    Those of a real model are in its files: `fmoe.checkpoint.open_checkpoint(path).specs` is what `assert_laws`
    takes, with no strategy at all.
    dtypes: one is drawn for all tensors (default: those that hold any normal value). Raises AdapterError for an adapter
    with no rules, and for a ragged axis with two or more parts of unknown length, which cannot be inverted.

    >>> import fmoe
    >>> from hypothesis import given, settings
    >>> adapter = fmoe.rule("w.{e} [d]", "w [e d]")
    >>> @settings(max_examples=3, deadline=None, database=None)
    ... @given(checkpoints(adapter))
    ... def test_mine(specs):
    ...     fmoe.testing.assert_laws(adapter, specs)
    >>> test_mine()
    """
    dtype = draw(st.sampled_from([*dtypes] or [torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    settled = adapter
    while choices := {n: options for stage in settled.stages for n, options in stage.choices().items()}:
        settled = settled.choose(**{n: draw(st.sampled_from(options)) for n, options in choices.items()})
    if not any(isinstance(stage, Table | Beside) for stage in adapter.stages):
        raise AdapterError(f"no table of rules to draw names from in:\n{adapter}")
    specs = _staged(draw, adapter.stages, settled.stages, dtype)
    if any(isinstance(e, Alias | Copies) for e in _entries(adapter.stages)):  # kept without what it is tied to?
        specs, _ = _fitting(adapter.stages, specs)
    return specs


@st.composite
def family_checkpoints(draw: Callable[..., Any], model_type: str, **choices: Any) -> tuple[Adapter, Specs]:
    """(adapter, HF specs) of a family: its config's sizes drawn, and a checkpoint that fits them.

    >>> import fmoe
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=3, deadline=None, database=None)
    ... @given(family_checkpoints("mixtral"))
    ... def test_mixtral(drawn):
    ...     fmoe.testing.assert_laws(*drawn)
    >>> test_mixtral()
    """
    found = family(model_type)
    sizes = {f: draw(st.integers(1, 5)) for f in ("n_routed_experts", "moe_inter_dim", "dim")} | {
        "n_activated_experts": 1
    }
    config = {found.fields[f].split()[0]: n for f, n in sizes.items()}
    adapter = found.adapter(config, **choices)
    return adapter, draw(checkpoints(adapter))


@st.composite
def rules(draw: Callable[..., Any], max_axes: int = 5) -> Adapter:
    """A random rule: letters in names or axes, on either side; composite, interleaved, chosen, of size 1, square.

    >>> from hypothesis import find
    >>> find(rules(), lambda rule: True).lossless
    True
    """
    letters = draw(st.permutations("abcdefg"))[: draw(st.integers(1, max_axes))]
    sizes = {a: draw(st.integers(1, 3)) for a in letters}
    places = {a: draw(st.sampled_from(["axis", "axis", "hf name", "native name", "both names"])) for a in letters}
    choices = {a for a in letters if places[a] != "axis" and draw(st.booleans())}

    def spell(axis: str) -> str:
        words = "|".join(axis + "xyz"[i] for i in range(sizes[axis]))
        return f"{{{axis}={words}}}" if axis in choices else f"{{{axis}{draw(st.sampled_from(WIDTHS))}}}"

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


def _staged(draw: Callable[..., Any], open_: Stages, stages: Stages, dtype: torch.dtype) -> Specs:
    """What goes into stages in a row: drawn for each, the last first, and taken back through those before it."""
    specs: Specs = {}
    for k in reversed(range(len(stages))):
        new, stage, was = dict[str, TensorSpec](), stages[k], open_[k]
        if isinstance(stage, Table) and isinstance(was, Table):
            new = _table(draw, was.entries, stage.entries, dtype)
        elif isinstance(stage, Beside) and isinstance(was, Beside):
            sides = [_staged(draw, *side, dtype) for side in ((was.left, stage.left), (was.right, stage.right))]
            new, _ = _fitting((stage,), sides[0] | sides[1])
        for before in reversed(stages[:k]):
            _, new = _fitting((before.inverse,), new)
        specs = _fitting(stages, new | specs)[0] if specs | new else {}  # later stages ask for more
    return specs


def _entries(stages: Stages) -> Iterator[Entry]:
    for stage in stages:
        if isinstance(stage, Table):
            yield from walk(stage.entries)
        elif isinstance(stage, Beside):
            yield from _entries(stage.left + stage.right)


def _fitting(stages: Stages, specs: Specs) -> tuple[Specs, Specs]:
    """As many of the specs as the stages take in a row, and what they make of them."""
    while True:
        try:
            return specs, plan_stages(stages, specs, {}, frozenset()).targets
        except AdapterError as error:
            alike = Names(error.keys).rows  # where all that is named is missing: what it is missing from
            wrong = specs.keys() & set(error.keys) or {
                n for t, rows in Names(specs).rows.items() if t in alike for n in rows.names
            }
            for parent in [] if wrong else _parents(error.keys):  # what lacks a part of its own
                wrong = wrong or {n for n in specs if n.startswith(parent)}
            if not wrong:
                raise
            specs = {n: spec for n, spec in specs.items() if n not in wrong}


def _parents(names: Iterable[str]) -> list[str]:
    """The modules of names, the innermost first: `a.b.` and `a.` of `a.b.c`."""
    found = dict.fromkeys(".".join(n.split(".")[:k]) + "." for n in names for k in range(1, n.count(".") + 1))
    return sorted(found, key=lambda name: -name.count("."))


def _table(draw: Callable[..., Any], open_: tuple[Entry, ...], entries: tuple[Entry, ...], dtype: torch.dtype) -> Specs:
    """What goes into a table: of every entry some names, none that an entry of another option would claim."""
    sizes: dict[str, int] = {}
    size = lambda axis: sizes[axis] if axis in sizes else sizes.setdefault(axis, draw(SIZE))
    specs: Specs = {}

    for entry in entries:
        if isinstance(entry, Rule | Together):
            bundle = entry.rules if isinstance(entry, Together) else (entry,)
            if told := next(filter(None, map(loose_parts, bundle)), None):
                raise AdapterError(told)
            optional = any(_scales(r) for r in bundle)  # scales have no meaning alone
            for _ in range(0 if optional else draw(OFTEN)):
                at = {n: draw(shared(r, n)) for r in bundle for n in r.shared}
                new = {n: spec for each in bundle for n, spec in claimed(each, at, size, dtype).items()}
                if not claim(entries, Names(new)).problems:
                    specs |= new
    spared = [e for e in entries if isinstance(e, Keep) or isinstance(e, Drop) and not e.flipped]
    spelled = [_names(draw, entry.rule) for entry in spared]
    free = _free(open_, entries, [n for names in spelled for n in names])
    for names in spelled:
        some = tuple(n for n in names if n in free)
        specs |= {n: TensorSpec((size("kept"), 2), dtype) for n in (sorted(draw(_some(some))) if some else ())}
    for entry in entries:
        if isinstance(entry, Copies) and not entry.flipped:
            at = {n: draw(shared(entry.original, n)) for n in entry.of.captures}
            of = patterns(entry.original)[0].render(at)
            specs |= {} if _hits(open_, [of]) or of in specs else {of: TensorSpec((size("kept"), 2), dtype)}
            there = written((entry,), Names(specs))[0] if draw(MAYBE) else ()  # all of them, or none
            specs |= {alias.name: specs[alias.of] for alias in there if isinstance(alias, Alias)}
    for alias in entries:
        if isinstance(alias, Alias) and not alias.flipped and draw(MAYBE):
            if not claim(entries, Names([alias.of])).problems and not _hits(open_, [alias.of]):
                specs.setdefault(alias.of, TensorSpec((size("kept"), 2), dtype))
            specs |= {alias.name: specs[alias.of]} if alias.of in specs else {}
    return specs


def _free(open_: tuple[Entry, ...], entries: tuple[Entry, ...], names: list[str]) -> set[str]:
    """Those of the names that nothing but a keep or a drop takes."""
    free = {n for n in names if not n.endswith(SUFFIX)} - _hits(open_, names)
    asked = {n for problem in claim(entries, Names(sorted(free))).problems for n in problem.keys}
    return free - {n for n in asked if claim(entries, Names([n])).problems}  # alone: beside others it may be suspected


@lru_cache(maxsize=256)
def _some(names: tuple[str, ...]) -> st.SearchStrategy[set[str]]:
    return st.sets(st.sampled_from(names))


def _scales(rule: Rule) -> bool:
    """Whether a rule carries the scales of quantised tensors, of one format or of any."""
    return rule.source.name.endswith(SUFFIX) or "scale" in rule.source.captures


def _hits(entries: tuple[Entry, ...], names: Iterable[str]) -> set[str]:
    """The names that a rule takes, in one of its directions."""
    sides = [side for e in walk(entries) if isinstance(e, Rule) for side in (e, e.inverse)]
    return {n for _, _, _, rows in all_hits(sides, Names(dict.fromkeys(names))) for n in rows.names}


def _names(draw: Callable[..., Any], rule: Rule) -> list[str]:
    """Names that a keep or a drop fits: some that checkpoints have, and some spelled after its pattern."""
    spelled = [{n: draw(shared(rule, n)) for n in rule.shared} for _ in range(2)]
    names = list(dict.fromkeys([*KEPT, *(patterns(rule)[0].render(values) for values in spelled)]))
    fitting = {n for _, _, rows in hits(rule, Names(names)) for n in rows.names}
    return [n for n in names if n in fitting]


held(globals(), "checkpoints family_checkpoints rules", where="fmoe.testing")
