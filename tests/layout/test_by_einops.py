"""What an adapter makes of a rule is what einops makes of it: two readings of one notation that share no code."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmoe
from fmoe.layout.entries import walk
from fmoe.layout.notation import Rule
from fmoe.layout.table import Table
from fmoe.testing import by_einops, checkpoints, rules, same, tensors


@st.composite
def drawn(draw):
    adapter = draw(rules())
    return adapter, draw(checkpoints(adapter))


@settings(max_examples=60, deadline=None)
@given(drawn())
def test_of_random_rules(found):
    adapter, specs = found
    hf = tensors(specs)
    same(by_einops(adapter, hf), adapter.from_hf(hf))


def of_experts() -> list[Rule]:
    """Every different rule of a family with the letter e, that is neither ragged nor shifted."""
    found: dict[str, Rule] = {}
    for family in fmoe.families.FAMILIES.values():
        for stage in family.rules.stages:
            for entry in walk(stage.entries) if isinstance(stage, Table) else ():
                if isinstance(entry, Rule) and entry.source.axes and "e" in entry.letters and not entry.ragged:
                    if not any(c.offset or c.by for s in (entry.source, entry.target) for c in s.captures.values()):
                        found[str(entry)] = entry
    return list(found.values())


RULES = of_experts()


def test_there_are_rules_of_many_forms():
    assert len(RULES) > 40 and any(r.unstacked for r in RULES) | any("(i g)" in str(r.source) for r in RULES)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_of_every_familys_experts(rule):
    sizes = {letter: 2 + k % 3 for k, letter in enumerate(sorted(rule.letters))}
    sizes |= {n: len(c.choices) for s in (rule.source, rule.target) for n, c in s.captures.items() if c.choices}
    bound = rule.bind({n: size for n, size in sizes.items() if n in {*rule.source.atoms, *rule.target.atoms}})
    adapter = fmoe.Adapter((Table((bound,)),))
    hf = tensors(_specs(bound))
    same(by_einops(adapter, hf, **sizes), adapter.from_hf(hf))


def _specs(bound: Rule) -> dict[str, fmoe.TensorSpec]:
    """Two layers of what a bound rule reads: specs of its target, taken back."""
    sizes = {letter: len(found) for letter, found in bound.bounds}
    shape = tuple(prod(sizes.get(letter, 1) for letter in dim) for dim in bound.target.axes)
    spelled = lambda c: list(c.choices) or (["0", "1"] if len(c.name) == 1 else ["model."])
    parts = [[part] if isinstance(part, str) else spelled(part) for part in bound.target.parts]
    native = {"".join(name): fmoe.TensorSpec(shape, torch.float32) for name in product(*parts)}
    return fmoe.Adapter((Table((bound,)),)).inverse.plan(native).targets
