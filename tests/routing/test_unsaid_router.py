"""A registered family that does not say its router: route and moe refuse it by name, experts and the rest work."""

from dataclasses import replace

import pytest
import torch

import fmoe
from fmoe.families import FAMILIES

CONFIG = {"model_type": "mine", "n": 4, "k": 2, "hidden_size": 6, "expert_size": 3, "scoring": "sigmoid"}
FIELDS = dict(n_routed_experts="n", n_activated_experts="k", dim="hidden_size", moe_inter_dim="expert_size")
MINE = fmoe.families.Family(model_types=("mine",), rules=FAMILIES["qwen3_moe"].rules, fields=FIELDS)
PARAMS = {"gate.weight": torch.randn(4, 6), "experts.gate_and_up_projs": torch.randn(4, 6, 6)}
PARAMS |= {"experts.down_projs": torch.randn(4, 3, 6)}
X = torch.randn(5, 6)


@pytest.mark.parametrize(
    ("how", "unsaid"),
    [
        ({}, "unsaid by mine: score_func in its fixed or fields"),
        ({"fixed": dict(norm_topk_prob=True)}, "unsaid by mine: score_func in its fixed or fields"),
        ({"fields": FIELDS | dict(score_func="absent")}, "unsaid by mine: score_func in its fixed or fields"),
        ({"fixed": dict(score_func="softmax")}, "softmax before or after top k, unsaid by mine: softmax_before_topk"),
    ],
)
def test_a_router_that_is_not_said_is_refused_by_name(how, unsaid):
    adapter = replace(MINE, **how).adapter(CONFIG)
    config = adapter.moe_config
    calls = (
        lambda: fmoe.route(PARAMS, X, config),
        lambda: fmoe.moe(PARAMS, X, config),
        lambda: fmoe.nn.MoE(config).float()(X),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"score_func is '{unsaid}.*expected one of softmax"):
            call()
    routing = fmoe.Routing(torch.tensor([[0, 1]] * 5), torch.ones(5, 2))
    y = fmoe.experts(fmoe.subtree(PARAMS, "experts"), X, routing, config)
    assert torch.equal(y, fmoe.moe(PARAMS, X, config, routing=routing))


@pytest.mark.parametrize(
    "how",
    [
        {"fixed": dict(score_func="sigmoid")},
        {"fields": FIELDS | dict(score_func="scoring")},
        {"fixed": dict(score_func="softmax", softmax_before_topk=True)},
        {"fixed": dict(softmax_before_topk=False)},
        {"fixed": dict(score_func="softmax"), "fields": FIELDS | dict(softmax_before_topk="before")},
    ],
)
def test_a_router_that_is_said_routes(how):
    config = replace(MINE, **how).adapter(CONFIG).moe_config
    assert fmoe.moe(PARAMS, X, config).shape == X.shape


def test_every_family_that_is_verified_as_a_block_says_its_router():
    for name, kind in FAMILIES.items():
        if kind.verified in ("block", "keys", "laws"):
            words = [says for values in kind.words.values() for says in values.values()]
            said = {*kind.fixed, *kind.fields, *(field for says in words for field in says)}
            assert "softmax_before_topk" in said or kind.fixed.get("score_func") not in (None, "softmax"), name
