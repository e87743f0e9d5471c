"""Routers: parity with Transformers' own modules, score functions and groups against plain python, and errors."""

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fmoe.routing import SCORES, drop, route, topk_routing
from fmoe.types import MoEConfig, Routing

E, K, D, T = 12, 3, 10, 37
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=4)


class Peer(NamedTuple):
    """A Transformers router: its family, class, configuration class, HF fields, and our fields."""

    family: str
    router: str
    config: str
    hf: dict[str, Any]
    ours: dict[str, Any]


SOFTMAX = dict(softmax_before_topk=True)
SIGMOID = dict(score_func="sigmoid", router_weights_fp32=True, route_scale=2.5, force_e_score_correction_bias=True)
GROUPED = dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5)
PEERS = {
    "mixtral": Peer(
        "mixtral",
        "MixtralTopKRouter",
        "MixtralConfig",
        dict(num_local_experts=E),
        SOFTMAX | dict(norm_topk_prob=True, router_weights_fp32=True),
    ),
    "qwen3_moe": Peer(
        "qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", dict(num_experts=E, norm_topk_prob=False), SOFTMAX
    ),
    "qwen3_moe normalised": Peer(
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        "Qwen3MoeConfig",
        dict(num_experts=E, norm_topk_prob=True),
        SOFTMAX | dict(norm_topk_prob=True),
    ),
    "qwen3_5_moe": Peer(
        "qwen3_5_moe",
        "Qwen3_5MoeTopKRouter",
        "Qwen3_5MoeTextConfig",
        dict(num_experts=E),
        SOFTMAX | dict(norm_topk_prob=True),
    ),
    "gpt_oss": Peer("gpt_oss", "GptOssTopKRouter", "GptOssConfig", dict(num_local_experts=E), dict(router_bias=True)),
    "deepseek_v3": Peer(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        GROUPED | dict(n_routed_experts=E),
        SIGMOID | dict(norm_topk_prob=True, n_expert_groups=4, n_limited_groups=2),
    ),
    "nemotron_h": Peer(
        "nemotron_h",
        "NemotronHTopkRouter",
        "NemotronHConfig",
        GROUPED | dict(n_routed_experts=E, norm_topk_prob=False, n_group=3, topk_group=1),
        SIGMOID | dict(n_expert_groups=3, n_limited_groups=1),
    ),
}


def build(peer: Peer, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], MoEConfig]:
    """(Transformers' module, our params, our config), with random weights."""
    package = importlib.import_module(f"transformers.models.{peer.family}")
    modeling = importlib.import_module(f"transformers.models.{peer.family}.modeling_{peer.family}")
    config = getattr(package, peer.config)(hidden_size=D, num_experts_per_tok=K, **peer.hf)
    router = getattr(modeling, peer.router)(config)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        tensor.data = 0.4 * torch.randn(tensor.shape, generator=generator)
        if "correction" not in name:  # Transformers keeps that one in fp32
            tensor.data = tensor.data.to(dtype)
    return router, {f"gate.{name}": p for name, p in router.state_dict().items()}, replace(CONFIG, **peer.ours)


def dense(indices: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: the order within K is arbitrary."""
    return torch.zeros(*indices.shape[:-1], E, dtype=weights.dtype).scatter(-1, indices, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_parity_with_transformers(name: str, dtype: torch.dtype) -> None:
    router, params, config = build(PEERS[name], dtype)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, weights, indices = router(x)
    ours = route(MappingProxyType(params), x, config)
    assert ours.weights.dtype == weights.dtype and ours.indices.dtype == torch.int64 and ours.mask is None
    assert torch.equal(ours.indices.sort().values, indices.sort().values)
    rtol = 1e-5 if weights.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(dense(*ours[:2]), dense(indices, weights), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("name", PEERS)
def test_gradient_parity_with_transformers(name: str) -> None:
    router, params, config = build(PEERS[name], torch.float32)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(2))
    r = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
    _, weights, indices = router(x)
    (dense(indices, weights) * r).sum().backward()

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (dense(*route(params, x, config)[:2]) * r).sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in params.items()})
    for weight, p in router.named_parameters():
        torch.testing.assert_close(grads[f"gate.{weight}"], p.grad, rtol=1e-4, atol=1e-6)


def plain(logits: list[float], config: MoEConfig, bias: list[float] | None) -> dict[int, float]:
    """One token, in python: expert -> weight."""
    exp = [math.exp(z) for z in logits]
    score: dict[str, Callable[[int], float]] = {
        "softmax": lambda e: exp[e] / sum(exp),
        "sigmoid": lambda e: exp[e] / (1 + exp[e]),
        "sqrtsoftplus": lambda e: math.sqrt(math.log1p(exp[e])),
    }
    kind = config.score_func.removesuffix("_with_bias")
    scores = [score[kind](e) for e in range(E)]
    choice = [s + b for s, b in zip(scores, bias or [0.0] * E, strict=True)]
    size = E // config.n_expert_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_expert_groups)]
    worth = lambda g: sum(sorted((choice[e] for e in groups[g]), reverse=True)[: 2 if bias else 1])
    best = sorted(range(len(groups)), key=worth, reverse=True)[: config.n_limited_groups]
    allowed = [e for g in best for e in groups[g]] if len(groups) > 1 else list(range(E))
    picked = sorted(allowed, key=lambda e: choice[e], reverse=True)[:K]
    given = choice if config.router_weight_uses_score_correction_bias else scores
    weights = {e: given[e] for e in picked}
    if config.score_func == "softmax" and not config.softmax_before_topk:
        weights = {e: exp[e] / sum(exp[f] for f in picked) for e in picked}
    total = sum(weights.values()) + 1e-20 if config.norm_topk_prob else 1.0
    return {e: w / total * config.route_scale for e, w in weights.items()}


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (6, 3), (12, 5)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("score", "biased"),
    [("softmax", False), ("softmax_with_bias", True), ("sigmoid", False), ("sigmoid", True)]
    + [("sigmoid_with_bias", True), ("sqrtsoftplus", False), ("sqrtsoftplus", True)],
)
def test_agrees_with_plain_python(score: str, biased: bool, norm: bool, groups: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, E, dtype=torch.float64, generator=generator)
    # negative biased scores: a group that lost must not come back
    bias = torch.randn(E, dtype=torch.float64, generator=generator) - 2 if biased else None
    for more in (dict(), dict(softmax_before_topk=True, router_weight_uses_score_correction_bias=biased)):
        fields: dict[str, Any] = dict(score_func=score, norm_topk_prob=norm, route_scale=1.5) | more
        config = replace(CONFIG, n_expert_groups=groups[0], n_limited_groups=groups[1], **fields)
        routing = topk_routing(logits, config, bias)
        assert routing.weights.dtype == torch.float64 and routing.indices.shape == (9, K)
        for t in range(9):
            found = dict(zip(routing.indices[t].tolist(), routing.weights[t].tolist(), strict=True))
            assert found == pytest.approx(plain(logits[t].tolist(), config, None if bias is None else bias.tolist()))


def test_group_worth_is_the_best_two_only_with_a_correction_bias() -> None:
    """Group 0 has the best score, group 1 the best pair."""
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.7]])
    config = MoEConfig(
        n_routed_experts=4, n_activated_experts=1, dim=1, moe_inter_dim=1, score_func="sigmoid", n_expert_groups=2
    )
    assert topk_routing(scores.logit(), config).indices.tolist() == [[0]]
    assert topk_routing(scores.logit(), config, torch.zeros(4)).indices.tolist() == [[2]]


@pytest.mark.parametrize("score", SCORES)
def test_gradients(score: str) -> None:
    logits = torch.randn(4, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bias = torch.randn(E, dtype=torch.float64) if score.endswith("_with_bias") else None
    config = replace(CONFIG, score_func=score, norm_topk_prob=score != "softmax")
    assert torch.autograd.gradcheck(lambda z: topk_routing(z, config, bias).weights, logits)


def test_sqrtsoftplus_of_very_negative_logits_has_a_finite_gradient() -> None:
    logits = torch.tensor([[-1e4, 1.0, 2.0, -200.0]], requires_grad=True)
    config = replace(CONFIG, n_routed_experts=4, n_activated_experts=2, score_func="sqrtsoftplus")
    topk_routing(logits, config).weights.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtype_of_weights(dtype: torch.dtype, fp32: bool) -> None:
    routing = route(
        {"gate.weight": torch.randn(E, D)}, torch.randn(5, D, dtype=dtype), replace(CONFIG, router_weights_fp32=fp32)
    )
    assert routing.weights.dtype == (torch.promote_types(dtype, torch.float32) if fp32 else dtype)


def test_no_tokens_and_other_names() -> None:
    params = {"gate.weight": torch.randn(E, D), "experts.down_projs": torch.ones(1)}
    indices, weights, mask = route(params, torch.randn(0, D), CONFIG)
    assert indices.shape == weights.shape == (0, K) and mask is None


def wrong(match: str, logits: Tensor | None = None, bias: Tensor | None = None, **fields: Any) -> None:
    with pytest.raises(ValueError, match=match):
        topk_routing(torch.zeros(2, E) if logits is None else logits, replace(CONFIG, **fields), bias)


def test_errors() -> None:
    wrong(r"score_func is 'tanh', expected one of softmax, softmax_with_bias, sigmoid", score_func="tanh")
    wrong(r"shape \[2, 5\], expected \[T, E=12\]", logits=torch.zeros(2, 5))
    wrong(r"E >= K=13", n_activated_experts=13)
    wrong(r"takes no e_score_correction_bias, expected 'softmax_with_bias'", bias=torch.zeros(E))
    wrong(r"'sigmoid_with_bias' needs an e_score_correction_bias", score_func="sigmoid_with_bias")
    wrong(r"n_expert_groups=5, n_limited_groups=1: expected G to divide E=12", n_expert_groups=5)
    wrong(r"g of G groups to hold K=3", n_expert_groups=6)
    wrong(r"n_limited_groups=7", n_expert_groups=6, n_limited_groups=7)
    wrong(r"n_limited_groups=2: expected 1 of 1 group", n_limited_groups=2)


def refuse(match: str, params: dict[str, Tensor], x: Tensor, **fields: Any) -> Routing | None:
    with pytest.raises(ValueError, match=match):
        return route(params, x, replace(CONFIG, **fields))
    return None


def test_parameter_errors() -> None:
    params, x = {"gate.weight": torch.zeros(E, D)}, torch.zeros(2, D)
    refuse(r"'gate.weight' is missing, expected shape \[E=12, D=10\]", {}, x)
    refuse(r"'gate.weight' has shape \[10, 12\], expected \[E=12, D=10\]", {"gate.weight": torch.zeros(D, E)}, x)
    refuse(r"unknown parameter 'gate.wieght'", params | {"gate.wieght": torch.zeros(1)}, x)
    refuse(r"'gate.bias' is missing, expected shape \[E=12\]", params, x, router_bias=True)
    refuse(r"'gate.e_score_correction_bias' is missing", params, x, score_func="sigmoid_with_bias")
    refuse(r"x has shape \[2, 1, 10\], expected \[T, D=10\]", params, x[:, None])


def test_a_capacity_beyond_all_integers_drops_nothing():
    given = Routing(torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert drop(given, 10**30).indices.tolist() == [[0, 1]]
