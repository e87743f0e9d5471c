"""The laws of an adapter, asserted on random tensors: inverse, order, abstract, tiling, views, restriction, purity."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmoe.layout.adapter import Adapter
from fmoe.layout.beside import BesidePlan
from fmoe.layout.grouping import Window
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.testing.apart import Function
from fmoe.testing.compared import assert_pure, clones, odd_values, same, tensors
from fmoe.testing.methods import assert_alone, assert_methods, assert_singles, assert_yields
from fmoe.testing.pairs import assert_follows, assert_pair
from fmoe.types import AdapterError, TensorSpec

Pair = tuple[Function, Function]


def assert_laws(adapter: Adapter | Pair, specs: Mapping[str, TensorSpec], seed: int = 0) -> None:
    """Inverse, order, completeness, abstract = concrete, views = copies, restriction = slice, purity: of any tensors.

    adapter: an Adapter, or two functions (from_hf, to_hf) over dicts of tensors. specs: what goes into from_hf.
    Of two functions the laws are inverse (of any bits, also -0.0 and NaN), order, purity, and that what is returned
    follows from the argument alone (function). A lossless adapter must keep all of them; one with a codec is held to
    the inverse on what it wrote itself. Raises AssertionError that says which law is broken.

    Of a class of your own, and of functions, order and values must also be the same in processes of other hash seeds,
    of which the first call starts two. Not held to that is what those cannot import: lambdas, functions inside of
    others, and those of `__main__`.

    >>> import fmoe
    >>> specs = {f"w.{e}": TensorSpec((3,), torch.float32) for e in range(2)}
    >>> assert_laws(fmoe.rule("w.{e} [d]", "w [e d]"), specs)
    >>> transpose = lambda params: {name: tensor.T for name, tensor in params.items()}
    >>> assert_laws((transpose, transpose), {"w": TensorSpec((2, 3), torch.float32)})
    """
    if not isinstance(adapter, Adapter):
        return assert_pair(*adapter, specs, seed)
    adapter = adapter.resolve(specs)
    if type(adapter) is Adapter:  # a class of yours may do otherwise
        adapter = _Once(adapter.stages, adapter.moe, adapter.config)
    aliases = [*_aliases(adapter.plan(specs))]
    drawn, odd = tensors(specs, seed), odd_values(specs, seed) if adapter.lossless else tensors(specs, seed ^ 1)
    for found in (drawn, odd):
        found |= {name: found[of].clone() for name, of in aliases}
    if not adapter.lossless:
        drawn, odd = (adapter.to_hf(adapter.from_hf(found), copy=True) for found in (drawn, odd))
    hf = MappingProxyType(drawn)
    before = clones(hf)
    native = MappingProxyType(adapter.from_hf(hf))
    assert_inverse(adapter, hf, native)
    assert_order(adapter, hf, native)
    assert_complete(adapter, hf)
    assert_abstract(adapter, hf, native)
    assert_tiles(adapter.plan(hf))
    assert_views(adapter, hf, native)
    assert_singles("single", adapter, native)
    if adapter.lossless:
        assert_alone(adapter, hf, native)
    assert_restricts(adapter, hf, native)
    assert_follows(adapter.from_hf, adapter.to_hf, hf, odd)
    if not isinstance(adapter, _Once):
        assert_methods(adapter, hf, native)
    assert_pure("a conversion", hf, before)


@dataclass(frozen=True)
class _Once(Adapter):
    """The same adapter, which plans once what it is asked for again: laws ask the same of some plans ten times.

    The same is: of the same names in the same order, of the same shapes and dtypes, for the same ranges.
    """

    plans: dict[Any, Plan] = field(default_factory=dict, compare=False, repr=False)

    def _plan(self, values: Mapping[str, Any], window: Window, local: frozenset[str] = frozenset()) -> Plan:
        stages = tuple(s.see(values) if hasattr(s, "see") else s for s in self.stages)
        given = tuple((n, tuple(v.shape), v.dtype) for n, v in values.items())
        asked = stages, given, tuple(window.items()), local
        if (made := self.plans.get(asked)) is None:
            made = self.plans[asked] = super()._plan(values, window, local)
        return made


def assert_order(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """`iter_hf`, `to_hf` and the plan have one order, which names alone settle: not the order of the dict given."""
    turned = dict(reversed(list(native.items())))
    expected = list(adapter.to_hf(native))
    for what, found in {
        "to_hf": list(adapter.to_hf(turned)),
        "iter_hf": [name for name, _ in adapter.iter_hf(turned)],
        "plan.targets": list(adapter.inverse.plan(turned).targets),
    }.items():
        assert found == expected, f"order: {what} yields {found[:8]}, expected {expected[:8]}"
    other = list(adapter.from_hf(dict(reversed(list(hf.items())))))
    assert other == list(native), f"order: of another order from_hf makes {other[:4]}, expected {list(native)[:4]}"


def assert_complete(adapter: Adapter, hf: Mapping[str, Tensor]) -> None:
    """Each name stands in one unit, there and back; and the plan of the way back gives every name, shape and dtype."""
    there = adapter.plan(hf)
    back = adapter.inverse.plan(there.targets)
    if adapter.lossless:
        same(back.targets, hf, "completeness: the plan of to_hf")
    for plan, names in ((there, hf), (back, there.targets)):
        sources = [name for unit, _ in plan.units() for name in unit]
        targets = [name for _, unit in plan.units() for name in unit]
        assert sorted(sources) == sorted(names), (
            f"completeness: {set(names) ^ set(sources)} stand in no unit, or in two"
        )
        assert sorted(targets) == sorted(plan.targets), "completeness: a target stands in no unit, or in two"


def _aliases(plan: Plan) -> Iterator[tuple[str, str]]:
    """Each alias that goes into some stage, and what it is an alias of, under the names that go into the first."""
    origin = {n: n for n in plan.specs}
    for stage in plan.stages:
        pairs: Iterable[tuple[str, str]] = ()
        if isinstance(stage, TablePlan):
            pairs = [(a.name, a.of) for a in stage.aliases if not a.flipped]
        elif isinstance(stage, BesidePlan):
            pairs = chain(*map(_aliases, stage.plans))
        yield from ((origin[name], origin[of]) for name, of in pairs)
        made = ((s, t) for s, targets in stage.units() for t in targets)
        origin = {t: origin[s[0]] for s, t in made if s and s[0] in origin}


def assert_inverse(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """to_hf(from_hf(x)) == x and from_hf(to_hf(n)) == n, by views and by copies; the same through `inverse`."""
    same(adapter.to_hf(native), hf, "inverse: to_hf(from_hf(x))")
    same(adapter.to_hf(adapter.from_hf(hf, copy=True, contiguous=True)), hf, "inverse: to_hf(from_hf(x, copy=True))")
    same(adapter.inverse.from_hf(native), hf, "inverse: inverse.from_hf(from_hf(x))")
    same(adapter.from_hf(adapter.to_hf(native, copy=True)), native, "inverse: from_hf(to_hf(from_hf(x), copy=True))")
    same(dict(adapter.iter_hf(native)), hf, "inverse: iter_hf(from_hf(x))")
    assert adapter.inverse.inverse == adapter, "inverse: the inverse of the inverse is another adapter"
    for name, copied in adapter.from_hf(hf, copy=True).items():
        shared = {t.untyped_storage().data_ptr() for t in hf.values() if t.numel()}
        assert copied.untyped_storage().data_ptr() not in shared, (
            f"purity: with copy=True {name!r} shares memory with the input"
        )


def assert_abstract(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """The plan's targets, and conversions of specs and of meta tensors, say what conversions of tensors give."""
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()}
    same(adapter.plan(specs).targets, native, "abstract: plan(specs).targets")
    same(adapter.from_hf(specs), native, "abstract: from_hf(specs)")
    same(adapter.from_hf({n: t.to("meta") for n, t in hf.items()}), native, "abstract: from_hf of meta tensors")
    same(adapter.to_hf(adapter.from_hf(specs)), specs, "abstract: to_hf(from_hf(specs))")


def assert_tiles(plan: Plan) -> None:
    """The copies of a table visit every element of every source and of every target exactly once."""
    for stage in plan.stages:
        if isinstance(stage, TablePlan):
            seen = {side: dict[str, Tensor]() for side in ("source", "target")}
            specs = {"source": stage.specs, "target": stage.targets}
            for copy in stage.copies():
                for side, name, start, steps in (
                    ("source", copy.source, copy.source_offset, copy.source_strides),
                    ("target", copy.target, copy.target_offset, copy.target_strides),
                ):
                    count = seen[side].setdefault(name, torch.zeros(specs[side][name].numel, dtype=torch.int64))
                    count.as_strided(copy.shape, steps, start).add_(1)
            for side, counts in seen.items():
                for name, count in counts.items():
                    assert bool((count == 1).all()), (
                        f"tiling: {side} {name!r} is visited {count.unique().tolist()} times"
                    )


def assert_views(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """Views under HF names show what `to_hf` returns, and writing all of them loads the model: every native name."""
    try:
        fresh = {n: torch.zeros_like(t) for n, t in native.items()}
        views = adapter.views(fresh)
    except AdapterError as error:  # then some HF tensor is made of several native ones, or decoded: and it says which
        assert error.keys, "views: an error that names no key"
        return
    for name, view in views.items():
        view.copy_(hf[name])
    same(fresh, native, "views: writing them")
    assert set(views.written()) == set(native), "views: not every native tensor is said to be written"
    assert not views.written([]), "views: something is said to be written before anything is"


def assert_restricts(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """from_hf(x, e=range(a, b)) is from_hf(x)[a:b] along e, reads nothing else of what is named by e, and goes back."""
    plan = adapter.plan(hf)
    tables = [stage for stage in plan.stages if isinstance(stage, TablePlan)]
    having = [group for table in tables for group in table.groups if "e" in group.sizes]
    beside = any(isinstance(stage, BesidePlan) for stage in plan.stages)
    leading = all(group.dims("target")[:1] == (("e",),) for group in having)
    if len({group.sizes["e"] for group in having}) != 1 or not leading or beside:
        return  # no e, or several, or one that is not simply sliced
    stacks, n = plan.stacks("e"), having[0].sizes["e"]
    for part in {range(0, n), range(n // 2, n), range(n - 1, n)}:
        if len(part):
            local = adapter.from_hf(hf, e=part)
            cut = {k: t[part.start : part.stop] if k in stacks else t for k, t in native.items()}
            same(local, cut, f"restriction: from_hf(x, e={part})")
            needed = adapter.plan(hf, e=part).sources
            same(adapter.from_hf({k: hf[k] for k in needed}, e=part), local, f"restriction: from_hf of e={part} alone")
            back = adapter.to_hf(local, e=part)
            assert set(back) == set(needed), f"restriction: to_hf of e={part} gives other names"
            assert_yields(f"restriction: iter_hf of e={part}", adapter.iter_hf(local, e=part), back)
            assert_singles("restriction", adapter, {n: t for n, t in local.items() if n in stacks}, e=part)
            same(
                {k: t for k, t in back.items() if t.shape == hf[k].shape},
                {k: hf[k] for k in back if back[k].shape == hf[k].shape},
                f"restriction: to_hf of e={part}",
            )
