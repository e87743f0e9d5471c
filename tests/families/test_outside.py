"""A family from outside the package, with every law, in under 30 lines: these."""

from pathlib import Path

import pytest
from hypothesis import given

import fmoe
from fmoe.testing import assert_laws, family_checkpoints

UP = fmoe.rule("{pre}{l}.ffn.{e}.{g=a|b} [i d]", "{pre}{l}.moe.experts.gate_and_up_projs [e d (g i)]")
DOWN = fmoe.rule("{pre}{l}.ffn.{e}.c [d i]", "{pre}{l}.moe.experts.down_projs [e i d]")
FIELDS = dict(n_routed_experts="experts", n_activated_experts="top", dim="width", moe_inter_dim="inner")


@pytest.fixture(autouse=True, scope="module")
def mine():
    rules = fmoe.together(UP, DOWN) | fmoe.keep("{rest}")
    kind = fmoe.families.Family(model_types=("mine",), rules=rules, fields=FIELDS)
    yield fmoe.families.register(kind)
    del fmoe.families.FAMILIES["mine"]


@given(family_checkpoints("mine"))
def test_every_law(drawn):
    assert_laws(*drawn)
    assert len(Path(__file__).read_text().splitlines()) < 30
