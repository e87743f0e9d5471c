"""Experts: every backend x activation x weighting mode x bias against the naive fp64 loop, and every derivative."""

from dataclasses import replace
from itertools import product

import naive
import pytest
import torch
from naive import draw, grads_of, near, tokens
from torch import Tensor

from fmoe.activations import ACTIVATIONS
from fmoe.backends import BACKENDS
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4, activation_limit=1.5)
ROUNDING = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}  # relative norm

# every activation, then the clamped form of swiglu; in both weighting modes
ACTS = [dict(expert_activation=name) for name in ACTIVATIONS] + [dict(swiglu_limit=0.7)]
MODES = [
    pytest.param(
        replace(CONFIG, **act, expert_bias=bias, apply_router_weight_after_down=after), id=f"{i}-{bias}-{after}"
    )
    for (i, act), bias, after in product(enumerate(ACTS), [False, True], [False, True])
]
every_mode = pytest.mark.parametrize("config", MODES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BIASED = replace(CONFIG, expert_bias=True)
both_weightings = pytest.mark.parametrize("config", [BIASED, replace(BIASED, apply_router_weight_after_down=True)])


@every_backend
@every_mode
def test_forward_and_backward_against_naive(config: MoEConfig, backend: str) -> None:
    params, (x, routing) = draw(config), tokens(config)
    y, grads = grads_of(experts, params, x, routing, config=config, backend=backend)
    expected, expected_grads = grads_of(naive.experts, params, x, routing, config=config)
    near(y, expected, 1e-13)
    for name in grads:
        near(grads[name], expected_grads[name], 1e-12)


@every_backend
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(config: MoEConfig, dtype: torch.dtype, backend: str) -> None:
    # no clamp is reached: rounding may carry a value across it, and there its gradient jumps
    config = replace(config, dim=32, moe_inter_dim=24, activation_limit=50.0, swiglu_limit=50 * config.swiglu_limit)
    params, (x, routing) = draw(config, dtype), tokens(config, T=24, dtype=dtype)
    params = {name: p / 3 for name, p in params.items()}
    routing = routing._replace(weights=routing.weights.float())
    y, grads = grads_of(experts, params, x, routing, config=config, backend=backend)
    expected, expected_grads = grads_of(naive.experts, params, x, routing, config=config)
    assert y.dtype == dtype
    near(y, expected, ROUNDING[dtype])
    for name in grads:
        near(grads[name], expected_grads[name], ROUNDING[dtype])


@every_backend
@pytest.mark.parametrize("after", [False, True])
def test_golden_c3(after: bool, backend: str) -> None:
    config = MoEConfig(
        n_routed_experts=3,
        n_activated_experts=2,
        dim=2,
        moe_inter_dim=1,
        expert_bias=True,
        apply_router_weight_after_down=after,
    )
    params = {
        "gate_and_up_projs": torch.tensor([[[1, 2], [0, 1]], [[-1, 1], [2, 0]], [[0.5, 0.5], [0.5, -0.5]]]),
        "down_projs": torch.tensor([[[1, -1]], [[2, 0.5]], [[-0.5, 3]]]),
        "gate_up_proj_bias": torch.tensor([[0, 1], [0.5, 0], [-0.25, 0.25]]),
        "down_proj_bias": torch.tensor([[1, 0], [0, -1], [0.5, 0.5]]),
    }
    x = torch.tensor([[1.0, 0], [0, 1], [2, -1]])
    indices, weights = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5], [1, 2]])
    y = torch.tensor([[2.5067058, -1.4408257], [0.5, -0.5], [-0.4437186, -0.967329]])
    y01 = torch.tensor([[2.3948818, -1.6448818], [0.5, -0.5], [-0.8207425, -2.2051856]])
    y2 = torch.tensor([[0.111824, 0.2040561], [0, 0], [0.3770239, 1.2378567]])

    run = lambda indices, mask=None: experts(params, x, Routing(indices, weights, mask), config, backend=backend)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    close(run(indices), y)
    close(run(indices, torch.tensor([True, False, True])), y * torch.tensor([[1.0], [0.0], [1.0]]))
    close(run(indices.where(indices < 2, 103)), y01)
    close(run(indices.where(indices == 2, -1)), y2)


@every_backend
@both_weightings
def test_derivatives(config: MoEConfig, backend: str) -> None:
    config = replace(config, dim=2, moe_inter_dim=2, n_routed_experts=3, n_activated_experts=2)
    params, (x, routing) = draw(config), tokens(config, T=3)

    def f(x: Tensor, weights: Tensor, *values: Tensor) -> Tensor:
        return experts(
            dict(zip(params, values, strict=True)), x, routing._replace(weights=weights), config, backend=backend
        )

    leaves = [t.requires_grad_() for t in (x, routing.weights, *params.values())]
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@every_backend
@every_mode
def test_func_grad(config: MoEConfig, backend: str) -> None:
    params, (x, routing) = draw(config), tokens(config)

    def loss(params: dict[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
        y = experts(params, x, routing._replace(weights=weights), config, backend=backend)
        r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).bfloat16()
        return (y * r).sum()

    dparams, dx, dweights = torch.func.grad(loss, (0, 1, 2))(params, x, routing.weights)
    _, expected = grads_of(experts, params, x, routing, config=config, backend=backend)
    for name, grad in {**dparams, "x": dx, "weights": dweights}.items():
        torch.testing.assert_close(grad, expected[name])


@every_backend
@both_weightings
def test_vmap_over_models(config: MoEConfig, backend: str) -> None:
    """Two sets of parameters and tokens, one routing."""
    (x, routing), models = tokens(config), [draw(config, seed=s) for s in (3, 4)]
    stacked = {name: torch.stack([m[name] for m in models]) for name in models[0]}
    f = lambda params, x: experts(params, x, routing, config, backend=backend)
    xs = torch.stack([x, -x])
    expected = torch.stack([f(m, x) for m, x in zip(models, xs, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(stacked, xs), expected)
