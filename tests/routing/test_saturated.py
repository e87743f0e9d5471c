"""Routers whose scores are 0 in fp32: what they weigh there is what fp64 says, and gradients are finite."""

from dataclasses import replace

import hf_zoo as zoo
import pytest
import torch
from torch import Tensor

import fmoe
from fmoe.routing import topk_routing
from fmoe.routing.scores import SCORES

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LOW = (-2e4, -3e3, -400.0, -150.0, -70.0, -20.0, -3.0, 0.5, 4.0)
BOTH = torch.tensor([(a, b) for a in LOW for b in LOW], dtype=torch.float64)
CONFIG = fmoe.MoEConfig(
    n_routed_experts=2, n_activated_experts=2, dim=1, moe_inter_dim=1, norm_topk_prob=True, norm_topk_eps=1e-20
)


def weighed(score: str, logits: Tensor) -> Tensor:
    """The weights of both experts, chosen before."""
    bias = torch.zeros(2) if SCORES[score].bias == "needed" else None
    ids = torch.arange(2).expand(len(logits), 2)
    return topk_routing(logits, replace(CONFIG, score_func=score), bias, ids).weights


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_no_score_has_a_floor(score: str, dtype: torch.dtype) -> None:
    """Both experts may weigh 0, where the sum of their scores is less than what is added to it."""
    logits = BOTH.to(dtype)
    found, right = weighed(score, logits), weighed(score, logits.double())
    assert found.dtype == torch.float32 and torch.allclose(found.double(), right, rtol=1e-4, atol=1e-5)
    leaf = logits.requires_grad_()
    weighed(score, leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_nan_is_no_score_of_0() -> None:
    for score in SCORES:
        assert weighed(score, torch.tensor([[float("nan"), 1.0]])).isnan().any()


@pytest.mark.parametrize("name", ["mistral4", "mistral_large4_text", "axk2", "glm4_moe", "dots1"])
def test_experts_of_groups_that_lost_are_chosen_where_transformers_does(name: str) -> None:
    """Where winners score 0 in fp32, a loser that scores 0 for the choice, and not -inf, may be chosen and weigh."""
    model = zoo.build(name)
    adapter = fmoe.adapter(model.config.model_type, model.config.to_dict())
    adapter = adapter.resolve(tensors := {n: t.clone() for n, t in model.state_dict().items()})
    at, router = next((n, m) for n, m in model.named_modules() if n.endswith("mlp.gate"))
    params = fmoe.subtree(adapter.from_hf(tensors), at.removesuffix(".gate"))
    config = replace(adapter.moe_config, n_expert_groups=2, n_limited_groups=1)
    router.n_group, router.num_group, router.topk_group = 2, 2, 1
    x = 300 * torch.randn(5000, config.dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, weights, ids = router(x)
        found = fmoe.route({n: t for n, t in params.items() if n.startswith("gate.")}, x, config)
    dense = lambda ids, weights: torch.zeros(5000, config.n_routed_experts).scatter(1, ids, weights)
    off = (dense(found.indices, found.weights) - dense(ids, weights)).abs().amax(1)
    assert off.max() < 5e-3 * weights.abs().max(), int((off > 5e-3).sum())
