"""A plan as copies: whatever the stages, they make what the plan makes, and every element exactly once."""

from itertools import product
from math import prod

import hf_synthetic as synthetic
import pytest
import tiny
import torch
from copies import by_copies
from drawn import adapters
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHOICES, FAMILIES

import fmoe
from fmoe.checkpoint.stream.flow import _Crossed, compose, flow
from fmoe.layout.axes import Copy
from fmoe.testing import checkpoints, family_checkpoints, rules, same, tensors

DTYPES = (torch.int8, torch.bfloat16, torch.float32, torch.float64)


def drawn(data, adapter, window=True):
    """(plan, tensors) of an adapter in one of its directions, for a range of one of its axes or for all."""
    specs = data.draw(checkpoints(adapter))
    there = adapter.resolve(specs)
    given = tensors(specs, data.draw(st.integers(0, 9)))
    given |= {a: given[of].clone() for a, of in _tied(there.plan(specs))}
    if data.draw(st.booleans()):
        given, there = there.from_hf(given, copy=True), there.inverse
    axes = sorted(frozenset().union(*(stage.axes() for stage in there.stages)))
    if window and axes and data.draw(st.booleans()):
        ends = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda r: r[0] < r[1]))
        try:
            plan = there.plan(given, **{data.draw(st.sampled_from(axes)): range(*ends)})
        except fmoe.AdapterError:  # beyond the axis
            return there.plan(given), given
        if plan.targets:
            return plan, given
    return there.plan(given), given


def _tied(plan):
    from fmoe.testing.laws import _aliases

    return _aliases(plan)


def agree(plan, given):
    same(by_copies(plan, given), plan.run(given))


@given(st.data())
def test_random_rules_as_copies(data):
    adapter = data.draw(rules())
    plan, given = drawn(data, adapter)
    agree(plan, given)
    assert not flow(plan).units


@given(st.data())
def test_random_rules_beside_others_after_renames_and_through_their_native_form_as_copies(data):
    adapter = data.draw(rules()) | fmoe.keep("{rest}")
    form = data.draw(st.sampled_from(["renamed", "before", "there and back"]))
    if form == "renamed":
        adapter = adapter >> fmoe.rename("y.", "z.")
    elif form == "before":
        adapter = fmoe.rename("", "root.") >> (adapter >> fmoe.rename("root.", ""))
    else:
        adapter = adapter >> adapter.inverse
    plan, given = drawn(data, adapter)
    agree(plan, given)
    assert not flow(plan).units


@given(st.data())
def test_whatever_a_user_builds_as_copies(data):
    agree(*drawn(data, data.draw(adapters())))


LAYOUTS = {n: ("per_expert", "fused") for n in ("qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h")}


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_every_family_as_copies_both_ways(family, data):
    adapter, specs = data.draw(family_checkpoints(family, **CHOICES.get(family, {})))
    adapter, given = adapter.resolve(specs), tensors(specs)
    for there, held in ((adapter, given), (adapter.inverse, adapter.from_hf(given))):
        plan = there.plan(held)
        agree(plan, held)
        assert not flow(plan).units


@pytest.mark.parametrize("family", LAYOUTS)
@given(data=st.data())
def test_one_layout_to_another_is_one_pass_of_copies(family, data):
    layouts = data.draw(st.permutations(LAYOUTS[family]))
    a, b = (fmoe.families.family(family).adapter(None, layout=layout) for layout in layouts)
    specs = {n: spec for n, spec in data.draw(checkpoints(a)).items() if not n.endswith("bias")}  # fused ones have none
    given, there = tensors(specs), a >> b.inverse
    agree(there.plan(given), given)
    assert not flow(there.plan(given)).units
    same(there.from_hf(given), b.to_hf(a.from_hf(given)))
    agree(there.inverse.plan(there.from_hf(given)), there.from_hf(given))


RAGGED = tiny.TINY | dict(hidden_size=136, moe_intermediate_size=130)
FP8 = {
    "one block": lambda: synthetic.deepseek_v3_fp8(**tiny.TINY),
    "ragged blocks": lambda: synthetic.deepseek_v3_fp8(**RAGGED),
    "bf16 scales": lambda: synthetic.deepseek_v3_fp8(torch.bfloat16, **tiny.TINY),
}


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("window", [{}, {"e": range(1, 2)}], ids=["all", "one expert"])
def test_what_changes_its_values_is_a_step_between_copies(name, window):
    config, given = FP8[name]()
    adapter = fmoe.adapter(config["model_type"], config).resolve(given)
    plan = adapter.plan(given, **window)
    agree(plan, given)
    assert not flow(plan).units and all(len(step.specs) in (0, 2) for step in flow(plan).steps)
    native = adapter.from_hf(given, **window)
    back = adapter.inverse._plan(native, window, frozenset(window))
    agree(back, native)
    assert not flow(back).units
    cast = fmoe.adapter(config["model_type"], config, dtype=torch.float32).resolve(given)
    agree(cast.plan(given, **window), given)
    quantised = adapter.choose(quantization=True).inverse.plan(adapter.from_hf(given))
    agree(quantised, adapter.from_hf(given))


def test_an_alias_is_made_whole_and_compared_with_what_it_is_an_alias_of():
    given = {"g": torch.arange(6.0).view(2, 3), "w": torch.ones(2)}
    for moving in (fmoe.rule("g [v d]", "h [d v]"), fmoe.rule("g", "h"), fmoe.rule("g [v d]", "h.{v} [d]", v=2)):
        tied = fmoe.alias("tied", of="g") | moving | fmoe.keep("{rest}")
        for adapter in (tied, tied >> fmoe.rename("h", "model.h")):
            hf = given | {"tied": given["g"].clone()}
            agree(adapter.resolve(hf).plan(hf), hf)
            native = adapter.resolve(hf).from_hf(hf)
            agree(adapter.resolve(hf).inverse.plan(native), native)
            spoiled = hf | {"tied": hf["tied"] + 1}
            plan = adapter.resolve(hf).plan(spoiled)
            with pytest.raises(fmoe.AdapterError, match="'tied' should be the same tensor as 'g'"):
                by_copies(plan, spoiled)


@st.composite
def copies_through(draw, sizes, source, target, towards):
    """A copy between a tensor of these sizes, of which it takes a box, and one that is laid out anew."""
    digits, axes = list(sizes), []
    while digits:  # neighbouring digits, as one axis or as several
        n = draw(st.integers(1, len(digits)))
        axes, digits = [*axes, prod(digits[:n])], digits[n:]
    strides = [prod(axes[i + 1 :]) for i in range(len(axes))]
    ranges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in axes]
    if draw(st.booleans()):
        ranges = [[0, n] for n in axes]
    shape = tuple(last - first for first, last in ranges)
    start = sum(first * s for (first, _), s in zip(ranges, strides, strict=True))
    order = draw(st.permutations(range(len(axes))))
    other = {k: prod(shape[j] for j in order[i + 1 :]) for i, k in enumerate(order)}
    here, there = (start, tuple(strides)), (0, tuple(other[k] for k in range(len(axes))))
    if towards:
        return Copy(source, target, shape, *there, *here, torch.int64)
    return Copy(source, target, shape, *here, *there, torch.int64)


def pairs(copy):
    """{(index in the source, index in the target)}"""
    return {
        (
            copy.source_offset + sum(i * s for i, s in zip(at, copy.source_strides, strict=True)),
            copy.target_offset + sum(i * s for i, s in zip(at, copy.target_strides, strict=True)),
        )
        for at in product(*map(range, copy.shape))
    }


@given(st.data())
def test_two_copies_as_one_move_what_both_do_index_by_index(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    others = data.draw(st.sampled_from([sizes, sizes, data.draw(st.permutations(sizes))]))
    a = data.draw(copies_through(sizes, "a", "n", True))
    b = data.draw(copies_through(others, "n", "b", False))
    expected = {(i, k) for i, n in pairs(a) for m, k in pairs(b) if n == m}
    try:
        made = compose(a, b)
    except _Crossed:  # a box that is no box in the other's digits
        whole = prod(a.shape) == prod(b.shape) == prod(sizes)
        assert not whole or others != sizes, "whole tensors in the same digits never cross"
        return
    assert (pairs(made) if made else set()) == expected
    assert made is None or prod(made.shape) == len(expected)


def test_digits_that_do_not_nest_and_boxes_that_carry_are_told_apart():
    two_by_three = Copy("a", "n", (2, 3), 0, (1, 2), 0, (3, 1), torch.int8)
    three_by_two = Copy("n", "b", (3, 2), 0, (2, 1), 0, (1, 3), torch.int8)
    with pytest.raises(_Crossed):
        compose(two_by_three, three_by_two)
    for first, n in ((1, 4), (2, 2), (1, 3)):  # no box of 2 x 3
        middle = Copy("a", "n", (n,), 0, (1,), first, (1,), torch.int8)
        with pytest.raises(_Crossed):
            compose(middle, Copy("n", "b", (2, 3), 0, (3, 1), 0, (1, 2), torch.int8))
    for adapter in (  # then `Plan.run` makes it
        fmoe.rule("x [(a b)]", "y [a b]", a=2, b=3) >> fmoe.rule("y [a b]", "y [(a b)]", a=2)
        >> fmoe.rule("y [(c d)]", "z [d c]", c=3, d=2),
        fmoe.rule("x [(a b)]", "y [b a]", a=2, b=3) >> fmoe.rule("y [b a]", "z [(b a)]", a=2)
        >> fmoe.rule("z [(c d)]", "z [d c]", c=2, d=3),
    ):  # fmt: skip
        held = {"x": torch.arange(6.0)}
        agree(adapter.plan(held), held)
