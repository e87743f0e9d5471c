"""Activations: golden vectors C1 of the specification, dtypes, derivatives, and errors."""

from dataclasses import replace

import naive
import pytest
import torch
from torch import Tensor

from fmoe.activations import (
    ACTIVATIONS,
    activation,
    geglu,
    is_gated_activation,
    quick_geglu,
    relu2,
    swiglu,
    swiglu_clamped,
    swiglu_oai,
)
from fmoe.types import MoEConfig

CONFIG = MoEConfig(n_routed_experts=1, n_activated_experts=1, dim=1, moe_inter_dim=3)
G, V = [-1, 0.5, 10], [2, -9, 0.25]
PAIRED = [-1, 2, 0.5, -9, 10, 0.25]

GOLDEN: dict[str, tuple[dict, list[float], list[float]]] = {
    "swiglu": (dict(), G + V, [-0.2689414, -1.4005335, 1.2499433]),
    "swiglu, limit 1": (dict(swiglu_limit=1.0), G + V, [-0.1344707, -0.1556148, 0.0913823]),
    "swiglu, limit -1": (dict(swiglu_limit=-1.0), G + V, [-0.2689414, -1.4005335, 1.2499433]),
    "swigluoai": (dict(expert_activation="swigluoai"), G + V, [-0.2313064, -1.0511653, 4.3749707]),
    "swigluoai, limit 0": (
        dict(expert_activation="swigluoai", activation_limit=0.0),
        G + V,
        [-0.2313064, -1.4015537, 6.2499997],
    ),
    "quick_geglu": (dict(expert_activation="quick_geglu"), PAIRED, [-0.2313064, -1.0511653, 4.3749707]),
    "quick_geglu, limit 0": (
        dict(expert_activation="quick_geglu", activation_limit=0.0),
        PAIRED,
        [-0.0771021, 0, 0],
    ),
    "geglu": (dict(expert_activation="geglu"), G + V, [-0.158808, -1.555713, 1.25]),
    "relu2": (dict(expert_activation="relu2"), G + V, [0, 0.125, 50, 2, 0, 0.03125]),
    "situ": (
        dict(expert_activation="situ", activation_alpha=1.0, activation_limit=0.0),
        G + V,
        [-0.2048242, -1.2944211, 0.1249943],
    ),
    "situ, linear beta 2": (
        dict(expert_activation="situ", activation_alpha=1.0, activation_limit=2.0),
        G + V,
        [-0.1559929, -0.2875781, 0.1243474],
    ),
}

# every way that a config selects one
VARIANTS = [replace(CONFIG, expert_activation=name, activation_limit=1.25) for name in ACTIVATIONS]
VARIANTS += [
    replace(CONFIG, swiglu_limit=0.7),
    replace(CONFIG, expert_activation="swigluoai", activation_limit=0.0, activation_alpha=1.3),
]
IDS = [*ACTIVATIONS, "swiglu_clamped", "swigluoai_unclamped"]


def u_of(config: MoEConfig, *lead: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    U = 6 if is_gated_activation(config.expert_activation) else 3
    return torch.randn(*lead, U, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_c1(case: str) -> None:
    fields, u, expected = GOLDEN[case]
    out = activation(replace(CONFIG, **fields))(torch.tensor(u)[None], torch.tensor([[0.5]]))
    torch.testing.assert_close(out, torch.tensor([expected]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
def test_agrees_with_the_formula(config: MoEConfig) -> None:
    u, p = u_of(config, 7), torch.rand(7, 1, dtype=torch.float64)
    expected = torch.stack([naive.act(row, config) for row in u])
    torch.testing.assert_close(activation(config)(u, p), expected * p)
    torch.testing.assert_close(activation(config)(u, None), expected)


@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_of_u_comes_back(config: MoEConfig, dtype: torch.dtype) -> None:
    u, p = u_of(config, 40, dtype=dtype), torch.rand(40, 1)
    out = activation(config)(u, p)
    expected = torch.stack([naive.act(row, config) for row in u.double()]) * p
    assert out.dtype == dtype and out.shape == (40, 3)
    assert (out.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", ["swiglu_clamped", "swigluoai"])
def test_clamped_ones_compute_in_fp32(name: str) -> None:
    """One rounding to bf16 at the end: equal to the fp32 result, rounded."""
    config = VARIANTS[IDS.index(name)]
    u, p = u_of(config, 200, dtype=torch.bfloat16), torch.rand(200, 1)
    act = activation(config)
    assert torch.equal(act(u, p), act(u.float(), p).bfloat16())


@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
def test_ranks(config: MoEConfig) -> None:
    act = activation(config)
    u = u_of(config, 2, 3, 4)
    p = torch.rand(2, 3, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(act(u, p)[1, 2, 3], act(u[1, 2, 3], p[1, 2, 3]))
    assert act(u[0, 0, 0], torch.ones(1, 1)).shape == (1, 3)
    assert act(u[:0], p[:0]).shape == (0, 3, 4, 3)


@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
def test_derivatives(config: MoEConfig) -> None:
    act = activation(config)
    u, p = u_of(config, 4, seed=3).requires_grad_(), torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, (u, p))
    assert torch.autograd.gradgradcheck(act, (u, p))


@pytest.mark.parametrize("config", VARIANTS, ids=IDS)
def test_func_transforms(config: MoEConfig) -> None:
    act = activation(config)
    u, p = u_of(config, 4, 5), torch.rand(4, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(act)(u, p), act(u, p))
    loss = lambda u, p: act(u, p).square().sum()
    each = torch.stack([torch.func.grad(loss)(u[i], p[i]) for i in range(4)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(u, p), each)


def test_functions_and_their_defaults() -> None:
    u, p = u_of(CONFIG, 5) * 9, torch.rand(5, 1)
    at = lambda **fields: activation(replace(CONFIG, **fields))(u, p)
    assert torch.equal(swiglu(u, p), at())
    assert torch.equal(swiglu_clamped(u, p, 2.0), at(swiglu_limit=2.0))
    assert torch.equal(swiglu_oai(u, p), at(expert_activation="swigluoai"))
    assert torch.equal(quick_geglu(u, p), at(expert_activation="quick_geglu"))
    assert torch.equal(geglu(u, p), at(expert_activation="geglu"))
    assert torch.equal(relu2(u, p), at(expert_activation="relu2"))
    g, v = u[:, ::2].clamp(max=7), u[:, 1::2].clamp(-7, 7)
    torch.testing.assert_close(quick_geglu(u, p, 1.5, 7.0, linear_offset=0.0), g * naive.sigmoid(1.5 * g) * v * p)


def test_errors() -> None:
    assert [name for name in ACTIVATIONS if not is_gated_activation(name)] == ["relu2"]
    with pytest.raises(ValueError, match="'silu', expected one of swiglu, swigluoai, quick_geglu, geglu, relu2"):
        is_gated_activation("silu")
    with pytest.raises(ValueError, match="'silu'"):
        activation(replace(CONFIG, expert_activation="silu"))
    for f in (swiglu, swiglu_clamped, swiglu_oai, quick_geglu, geglu):
        with pytest.raises(ValueError, match="5 columns, expected an even number"):
            f(torch.ones(2, 5), torch.ones(2, 1))
