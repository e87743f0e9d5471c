"""Every law, for random rules at random sizes and for every family; rules also against their definition, by index."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHOICES, FAMILIES, OTHERS

import fmoe
from fmoe.layout.names import patterns
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address
from fmoe.testing import assert_laws, checkpoints, family_checkpoints, rules, same, tensors


def only_rule(adapter: fmoe.Adapter) -> Rule:
    (found,) = adapter.stages[0].entries
    return found


def place(side: Address, at: dict[str, int], sizes: dict[str, int]) -> tuple[int, ...]:
    """Where an element lies: a composite index counts its axes as digits, the last one fastest."""
    index = []
    for dim in side.axes:
        position = 0
        for axis in dim:
            if axis != "1":
                position = position * sizes[axis] + at[axis]
        index.append(position)
    return tuple(index)


@given(st.data())
def test_a_rule_means_what_it_says_index_by_index(data):
    adapter = data.draw(rules())
    rule = only_rule(adapter)
    hf = tensors(data.draw(checkpoints(adapter)))
    native = adapter.from_hf(hf)
    sizes = {name: len(bound) for name, bound in rule.bounds}
    source, target = patterns(rule)
    seen = 0
    for values in product(*(range(n) for n in sizes.values())):
        at = dict(zip(sizes, values, strict=True))
        name = source.render(at)
        if name in hf:
            there = native[target.render(at)][place(rule.target, at, sizes)]
            assert torch.equal(hf[name][place(rule.source, at, sizes)], there)
            seen += 1
    assert seen == sum(t.numel() for t in hf.values()) == sum(t.numel() for t in native.values())


@given(st.data())
def test_random_rules_keep_every_law(data):
    adapter = data.draw(rules())
    assert_laws(adapter, data.draw(checkpoints(adapter)))


@given(st.data())
def test_random_rules_keep_every_law_beside_others_and_after_a_rename(data):
    adapter = data.draw(rules()) | fmoe.keep("{rest}")
    adapter = adapter >> fmoe.rename("y.", "z.") if data.draw(st.booleans()) else adapter
    specs = data.draw(
        checkpoints(data.draw(st.just(adapter)))
        if len(adapter.stages) == 1
        else checkpoints(fmoe.Adapter(adapter.stages[:1]))
    )
    assert_laws(adapter, specs)


@given(st.data())
def test_composition_inverts_backwards(data):
    f, g = data.draw(rules()), data.draw(rules())
    assert (f >> g).inverse == g.inverse >> f.inverse
    assert (f | fmoe.keep("{rest}")).inverse == f.inverse | fmoe.keep("{rest}")
    assert f.inverse.inverse == f and hash(f.inverse.inverse) == hash(f)
    there, back = only_rule(f), only_rule(f.inverse)
    written = Rule(there.target, there.source, there.bounds)
    assert back == written and hash(back) == hash(written) and str(back) == str(written)


RAGGED = [
    ("{p=q|k|v}.w [p d]", "qkv [(q|k|v) d]", dict(q=4, k=2, v=1)),
    ("{p=q|k|v}.w [(p h) d]", "qkv [d (v|q|k h)]", dict(q=2, k=1, v=1, h=3)),
    ("{e}.{p=a|b} [d p]", "w [e (b|a) d]", dict(a=1, b=3)),
]


@pytest.mark.parametrize("hf, native, sizes", RAGGED)
@pytest.mark.parametrize("turn", [False, True])
@given(data=st.data())
def test_ragged_concatenation_keeps_every_law(hf, native, sizes, turn, data):
    adapter = fmoe.rule(hf, native, **sizes)
    adapter = adapter.inverse if turn else adapter
    assert_laws(adapter, data.draw(checkpoints(adapter)))


def test_ragged_parts_lie_in_the_order_of_the_composite():
    q, k, v = torch.full((2, 1), 1.0), torch.full((1, 1), 2.0), torch.full((3, 1), 3.0)
    loose = fmoe.rule("{p=q|k|v}.w [p d]", "qkv [(v|q|k) d]")
    with pytest.raises(fmoe.AdapterError, match="bind v, q, k"):
        loose.from_hf({"q.w": q, "k.w": k, "v.w": v})
    sized = fmoe.rule("{p=q|k|v}.w [p d]", "qkv [(v|q|k) d]", q=2, k=1)
    native = sized.from_hf({"q.w": q, "k.w": k, "v.w": v})
    assert native["qkv"].flatten().tolist() == [3, 3, 3, 1, 1, 2]
    same(sized.to_hf(native), {"q.w": q, "k.w": k, "v.w": v})
    with pytest.raises(fmoe.AdapterError, match="qkv.*parts"):
        sized.to_hf({"qkv": native["qkv"][:2]})


@pytest.mark.parametrize("model_type", FAMILIES)
@given(data=st.data())
def test_families_keep_every_law(model_type, data):
    adapter, specs = data.draw(family_checkpoints(model_type, **CHOICES.get(model_type, {})))
    assert_laws(adapter, specs)


@pytest.mark.parametrize("model_type", OTHERS)
@settings(max_examples=5)
@given(data=st.data())
def test_families_under_other_names_keep_every_law(model_type, data):
    assert_laws(*data.draw(family_checkpoints(model_type, **CHOICES.get(model_type, {}))))
