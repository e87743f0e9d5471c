"""Strategies draw for a family with rules of one's own behind it; what is wrong is told short, and as it is."""

import pytest
import torch
from hypothesis import Phase, find, given, settings

import fmoe
from fmoe import TensorSpec, keep, rename, rule
from fmoe.testing import assert_laws, checkpoints

BASE = fmoe.adapter("qwen3_moe", {"model_type": "qwen3_moe", "num_experts": 2})
QKV = rule("{pre}self_attn.{p=q|k|v}_proj.weight [p d]", "{pre}self_attn.qkv.weight [(q|k|v) d]", q=4, k=2, v=2)
MINE = BASE >> (QKV | keep("{rest}")) >> rename("model.", "policy.")


def whole_block(specs) -> bool:
    parts = {n.partition("self_attn.")[0] for n in specs if "self_attn" in n}
    return any(f"{pre}self_attn.{p}_proj.weight" in specs for pre in parts for p in "qkv")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(checkpoints(MINE))
def test_a_family_with_rules_behind_it(specs):
    assert_laws(MINE, specs)


def test_whole_blocks_are_among_what_is_drawn():
    once = settings(deadline=None, max_examples=60, derandomize=True, phases=[Phase.generate])
    assert whole_block(find(checkpoints(MINE), whole_block, settings=once))


def test_the_strategy_says_its_adapter_in_a_line():
    from hypothesis.vendor import pretty

    assert pretty.pretty(MINE) == repr(MINE) and len(repr(checkpoints(MINE))) < 400


@pytest.mark.parametrize("turn", [lambda names: names, reversed], ids=["forward", "backward"])
def test_order_says_what_was_found_and_expected(turn):
    same = lambda params: {n: params[n] for n in turn(list(params))}
    specs = {f"w.{e}": TensorSpec((3,), torch.float32) for e in range(2)}
    with pytest.raises(AssertionError, match=r"^order: .* found \['w\.\d', .* expected \['w\.\d', .* Fix: .*sorted"):
        assert_laws((same, same), specs)
