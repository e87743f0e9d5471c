"""The nouns refuse what they cannot mean: configs, errors made of texts, views asked for names that they have not."""

from dataclasses import replace

import numpy
import pytest
import torch

import fmoe
from fmoe.activations import ACTIVATIONS
from fmoe.types import EXPERT_ACTIVATIONS, AdapterError, Problem

CONFIG = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6)


@pytest.mark.parametrize(
    "changed, why",
    [
        (dict(n_activated_experts=5), "n_activated_experts is 5 with n_routed_experts=4"),
        (dict(dim=True), "dim is True, expected a positive int"),
        (dict(n_routed_experts=0), "n_routed_experts is 0, expected a positive int"),
        (dict(moe_inter_dim=6.0), "moe_inter_dim is 6.0, expected a positive int"),
        (dict(expert_activation="silu"), "expert_activation is 'silu', expected one of swiglu, "),
        (dict(shared_expert_activation="gelu"), "shared_expert_activation is 'gelu', expected one of swiglu, "),
    ],
)
def test_a_config_that_no_layer_can_have_is_refused(changed, why):
    with pytest.raises(ValueError, match=f"MoEConfig.{why}"):
        replace(CONFIG, **changed)


@pytest.mark.parametrize("given", [torch.ones(2, 7), numpy.ones((2, 7)), object(), [1], {1: 2}, b"x"], ids=type)
@pytest.mark.parametrize("name", fmoe.MoEConfig.__dataclass_fields__)
def test_what_is_of_no_kind_that_a_field_has_is_refused_by_its_name(name, given):
    with pytest.raises(ValueError, match=rf"\b{name} is |{name}: "):
        replace(CONFIG, **{name: given})


def test_the_names_of_activations_are_those_that_there_are():
    assert tuple(ACTIVATIONS) == EXPERT_ACTIVATIONS


def test_an_error_says_each_problem_once_with_all_its_keys():
    error = AdapterError(["a", Problem("b", ("x",)), "a", Problem("b", ("y", "x"))])
    assert error.problems == ("a", "b") and error.keys == ("x", "y")
    assert str(error).startswith("2 problems:") and str(AdapterError(["a", "a"])) == "a"


def test_views_know_their_names():
    views = fmoe.rule("w.{e} [d]", "w [e d]").views({"w": torch.zeros(2, 3)})
    with pytest.raises(AdapterError, match="'w.2'") as error:
        views.written(["w.0", "w.2"])
    assert error.value.keys == ("w.2",)
