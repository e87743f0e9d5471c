"""A gate that was exchanged for another linear module: what config promises and only the gate had is missed by name."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_nn_surroundings import NORMED, WHOLE, drawn, tokens
from torch import nn

import fmoe

PROMISED: dict[str, dict[str, Any]] = {
    "force": dict(force_e_score_correction_bias=True),
    "update": dict(gate_bias_update_factor=1e-3),
    "score": dict(score_func="sigmoid_with_bias"),
}
PLAIN = dict(score_func="softmax", force_e_score_correction_bias=False, gate_bias_update_factor=0.0)
LOST = "MoE: the gate, of type Other, has no 'gate.e_score_correction_bias', expected .* as config has it. Fix: "


class Other(nn.Linear):
    """A linear module that somebody puts in the place of each."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Other":
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
        made.weight, made.bias = linear.weight, linear.bias
        return made


def exchanged(model: nn.Module) -> nn.Module:
    """A copy, each linear module in it another."""
    made = copy.deepcopy(model)
    for name, module in [*made.named_modules()]:
        if isinstance(module, nn.Linear):
            made.set_submodule(name, Other.of(module))
    return made


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("row", PROMISED)
def test_a_bias_that_is_promised_and_lost_is_told_and_one_given_again_counts(row: str, trains: bool) -> None:
    config = replace(WHOLE, **{**PLAIN, "score_func": "sigmoid", **PROMISED[row]})
    block = drawn(config)[1].train(trains)
    x = tokens(config=config)[0]
    other = exchanged(block)
    bias = block.gate.e_score_correction_bias
    assert bias.any() and type(other.gate) is Other
    for call in (other, other.route, *([lambda _: other.update_gate_bias()] if row == "update" else [])):
        with pytest.raises(ValueError, match=LOST):
            call(x)
    routing = block.route(x).routing
    assert torch.equal(other(x, routing=routing, count=False), block(x, routing=routing))  # no gate is asked
    other.gate.register_buffer("e_score_correction_bias", bias.clone())
    assert torch.equal(other(x), block(x))
    other.update_gate_bias()
    block.gate.e_score_correction_bias = None
    with pytest.raises(ValueError, match=LOST.replace("Other", "Gate")):
        block(x)


def test_where_none_is_promised_none_is_asked_for() -> None:
    block = drawn(config := replace(WHOLE, **PLAIN))[1]
    x = tokens(config=config)[0]
    other = exchanged(block)
    assert torch.equal(other(x), block(x))
    other.update_gate_bias()


@pytest.mark.parametrize("row", PROMISED)
def test_a_gate_of_a_norm_keeps_its_bias_where_its_linear_map_is_exchanged(row: str) -> None:
    config = replace(NORMED, **{**PLAIN, "score_func": "sigmoid", **PROMISED[row]})
    block, x = drawn(config)[1], tokens(config=config)[0]
    other = exchanged(block)
    assert type(other.gate.proj) is Other and torch.equal(other(x), block(x))
    other.gate = other.gate.proj
    with pytest.raises(ValueError, match=LOST):
        other(x)
    other.gate.register_buffer("e_score_correction_bias", block.gate.e_score_correction_bias.clone())
    with pytest.raises(ValueError, match="type Other, gives no weights of experts, 'gate.per_expert_scale'.*Fix: keep"):
        other(x)


@pytest.mark.filterwarnings("ignore")
def test_linear_modules_of_torchao() -> None:
    float8 = pytest.importorskip("torchao.float8")
    config = fmoe.MoEConfig(
        n_routed_experts=16, n_activated_experts=2, dim=32, moe_inter_dim=16, score_func="sigmoid_with_bias"
    )
    block, x = fmoe.nn.MoE(config), torch.randn(16, 32, dtype=torch.bfloat16)
    block.gate.e_score_correction_bias.normal_(std=2)
    how = dict(config=float8.Float8LinearConfig(emulate=True))
    made = float8.convert_to_float8_training(copy.deepcopy(block), **how)
    with pytest.raises(ValueError, match=LOST.replace("Other", "Float8Linear")):
        made(x)
    kept = lambda _, name: not name.endswith("gate")
    made = float8.convert_to_float8_training(copy.deepcopy(block), module_filter_fn=kept, **how)
    assert torch.equal(made.route(x).routing.indices, block.route(x).routing.indices)
