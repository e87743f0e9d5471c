"""No field of MoEConfig is ignored: a change of each changes what public calls make, or is refused by its name."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fmoe
from fmoe import MoEConfig

BASE = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=6, moe_inter_dim=4, dtype="float32")
SHARED = dict(n_shared_experts=1)
GROUPS = dict(n_expert_groups=2, n_limited_groups=2)
BIASED = dict(force_e_score_correction_bias=True, score_func="sigmoid")
LATENT = dict(moe_latent_size=3)
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "n_routed_experts": (5, {}),
    "n_activated_experts": (3, {}),
    "dim": (5, {}),
    "moe_inter_dim": (3, {}),
    "n_shared_experts": (2, SHARED),
    "n_expert_groups": (1, GROUPS | {"n_limited_groups": 1}),
    "n_limited_groups": (1, GROUPS),
    "train_gate": (False, {}),
    "gate_bias_update_factor": (0.5, {"score_func": "sigmoid"}),
    "aux_loss_coeff": (9.0, {}),
    "score_func": ("sigmoid", {}),
    "route_scale": (2.0, {}),
    "norm_topk_prob": (True, {"score_func": "sigmoid"}),
    "router_bias": (True, {}),
    "expert_bias": (True, {}),
    "expert_activation": ("geglu", {}),
    "apply_router_weight_after_down": (True, {"expert_bias": True, "dtype": "bfloat16"}),
    "activation_alpha": (0.5, {"expert_activation": "swigluoai"}),
    "activation_limit": (0.01, {"expert_activation": "quick_geglu"}),
    "swiglu_limit": (0.01, {}),
    "softmax_before_topk": (True, {}),
    "router_weights_fp32": (True, {"dtype": "bfloat16"}),
    "router_weight_uses_score_correction_bias": (True, BIASED),
    "dtype": ("bfloat16", {}),
    "gate_dtype": ("bfloat16", {}),
    "shared_expert_gate": (True, SHARED),
    "shared_expert_inter_dim": (3, SHARED),
    "shared_expert_activation": ("relu2", SHARED),
    "shared_swiglu_limit": (0.01, SHARED),
    "force_e_score_correction_bias": (True, {"score_func": "sigmoid"}),
    "moe_latent_size": (3, {}),
    "n_zero_experts": (2, {}),
    "apply_router_weight_before_up": (True, {}),
    "output_scale": (0.5, SHARED),
    "scaled_logits": (True, {}),
    "router_jitter": (0.5, {"score_func": "sparsemixer"}),
    "norm_topk_eps": (0.5, {"score_func": "sigmoid", "norm_topk_prob": True}),
    "norm_topk_min": (9.0, {"score_func": "sigmoid", "norm_topk_prob": True}),
    "logit_scale": (0.5, {}),
    "logit_softcap": (0.5, {}),
    "input_jitter": (0.5, {}),
    "latent_norm": ("before", LATENT),
    "norm_eps": (0.5, LATENT | {"latent_norm": "after"}),
    "norm_offset": (1.0, LATENT | {"latent_norm": "after"}),
    "router_norm": (True, {}),
    "expert_norm_eps": (1e-8, {}),
}
"""Another value of each field, and what stands beside it."""
REFUSED = {
    "enable_routing_replay": [True],
    "aux_loss_coeff": [-1.0, float("nan"), "1"],
    "gate_bias_update_factor": [-0.1, float("nan")],
    "swiglu_limit": [float("nan")],
    "shared_swiglu_limit": [float("nan"), "7"],
    "latent_norm": ["before", "between"],
    "logit_softcap": [-1.0],
    "input_jitter": [-0.5],
    "route_scale": [None, "a"],
    "n_expert_groups": [None, 2.0, -1],
    "score_func": [None, 3, ["softmax"]],
    "n_shared_experts": [-1, 1.5],
    "moe_latent_size": [-1, "4"],
    "norm_topk_prob": ["yes", 2],
}
SAID = {"inter_dim": "intermediate_size"}
"""Facts of a model that no layer here has: the adapter's config tells them."""


def made(config: MoEConfig) -> dict[str, Tensor]:
    """All that a layer of this config has and gives: its state, a step of training, its routing."""
    layer = fmoe.nn.MoE(config).train()
    with torch.no_grad():
        for n, p in [*layer.named_parameters(), *((n, b) for n, b in layer.named_buffers() if "correction" in n)]:
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    found = {n: t.clone() for n, t in layer.state_dict().items()}
    x = torch.randn(7, config.dim, generator=torch.Generator().manual_seed(1)).to(config.dtype).requires_grad_()
    torch.manual_seed(0)
    y, routed = layer(x, return_routed=True)
    y.float().square().sum().backward()
    layer.update_gate_bias()
    found |= {"y": y, "dx": x.grad, "indices": routed.routing.indices, "weights": routed.routing.weights}
    found |= {f"d {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return found | {f"after {n}": b for n, b in layer.named_buffers()}


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    same = lambda s, t: s.dtype == t.dtype and s.shape == t.shape and torch.equal(s, t)
    return a.keys() == b.keys() and all(same(t, b[n]) for n, t in a.items())


def test_every_field_has_a_row() -> None:
    assert {f.name for f in fields(MoEConfig)} == CHANGES.keys() | {"enable_routing_replay"} | SAID.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_changes_what_is_made(name: str) -> None:
    value, beside = CHANGES[name]
    config = replace(BASE, **beside)
    assert alike(made(config), made(replace(config)))
    assert not alike(made(config), made(replace(config, **{name: value})))


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_a_value_that_would_be_ignored_is_refused_by_its_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"MoEConfig.{name}"):
        replace(BASE, **{name: value})


@pytest.mark.parametrize("name", [f.name for f in fields(MoEConfig) if "float" in str(f.type)])
def test_no_field_is_nan_and_only_a_limit_is_infinite(name: str) -> None:
    for value in (float("nan"), float("-inf"), *([] if "limit" in name else [float("inf")])):
        with pytest.raises(ValueError, match=f"MoEConfig.{name} is"):
            replace(BASE, **{name: value})


@pytest.mark.parametrize("name", [f.name for f in fields(MoEConfig) if "bool" in str(f.type)])
def test_a_bool_is_a_bool(name: str) -> None:
    for value in (0, 1, 2, 1.0, "yes", None, torch.tensor(True), [True]):
        with pytest.raises(ValueError, match=f"MoEConfig.{name} is"):
            replace(BASE, **{name: value})
    assert isinstance(getattr(replace(BASE, **{name: False}), name), bool)


@pytest.mark.parametrize("value", [0, 1])
def test_a_number_for_a_bool_in_a_models_config_is_the_bool_that_it_says(value: int) -> None:
    sizes = dict(num_experts=4, num_experts_per_tok=2, hidden_size=6, moe_intermediate_size=4)
    assert fmoe.adapter("qwen3_moe", sizes | {"norm_topk_prob": value}).moe_config.norm_topk_prob is bool(value)


@pytest.mark.parametrize("name", SAID)
def test_a_fact_of_the_model_is_what_its_config_says(name: str) -> None:
    sizes = dict(num_experts=4, num_experts_per_tok=2, hidden_size=6, moe_intermediate_size=4)
    for value in (7, 9):
        assert getattr(fmoe.adapter("qwen3_moe", sizes | {SAID[name]: value}).moe_config, name) == value
