"""The whole block against its own sentence, with shared experts, latent projections, masks, and errors."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import naive
import pytest
import torch
from torch import Tensor

from fmoe.backends import BACKENDS
from fmoe.layer.block import moe
from fmoe.routing import route
from fmoe.types import MoEConfig

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=6, moe_inter_dim=3)
CONFIGS = {
    "plain": CONFIG,
    "shared": replace(CONFIG, n_shared_experts=2, score_func="sigmoid", force_e_score_correction_bias=True),
    "shared, gated": replace(CONFIG, n_shared_experts=1, shared_expert_gate=True, shared_expert_inter_dim=5),
    "shared, clamped": replace(CONFIG, n_shared_experts=1, swiglu_limit=0.3),
    "latent, relu2": replace(
        CONFIG,
        n_shared_experts=1,
        shared_expert_inter_dim=7,
        shared_expert_activation="relu2",
        expert_activation="relu2",
        moe_latent_size=4,
    ),
    "biases": replace(CONFIG, n_shared_experts=1, moe_latent_size=8, expert_bias=True, router_bias=True),
}


def draw(config: MoEConfig, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    E, D, L, I = config.n_routed_experts, config.dim, config.expert_dim, config.moe_inter_dim
    S, U = (
        config.n_shared_experts * (config.shared_expert_inter_dim or I),
        I if "relu2" in config.expert_activation else 2 * I,
    )
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (E, D),
        "experts.gate_and_up_projs": (E, L, U),
        "experts.down_projs": (E, I, L),
    }
    if S:
        shapes |= {"shared_experts.up_proj.weight": (S, D), "shared_experts.down_proj.weight": (D, S)}
    if S and config.shared_expert_activation == "swiglu":
        shapes["shared_experts.gate_proj.weight"] = (S, D)
    if config.shared_expert_gate:
        shapes["shared_expert_gate.weight"] = (1, D)
    if config.moe_latent_size:
        shapes |= {"fc1_latent_proj.weight": (L, D), "fc2_latent_proj.weight": (D, L)}
    if config.expert_bias:
        linear = [name for name in shapes if name.startswith(("shared_experts", "fc"))]
        shapes |= {name.removesuffix("weight") + "bias": shapes[name][:1] for name in linear}
        shapes |= {"experts.gate_up_proj_bias": (E, U), "experts.down_proj_bias": (E, L)}
    shapes |= {"gate.bias": (E,)} if config.router_bias else {}
    shapes |= {"gate.e_score_correction_bias": (E,)} if config.force_e_score_correction_bias else {}
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.7 * torch.randn(s, dtype=torch.float64, generator=generator)).to(dtype) for name, s in shapes.items()
    }


def tokens(*lead: int) -> Tensor:
    return torch.randn(*lead, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(p: dict[str, Tensor], x: Tensor, config: MoEConfig, mask: Tensor | None) -> Tensor:
    """The block in fp64, x [T, D]; routers have their own tests."""
    lin = lambda name, z: z @ p[f"{name}.weight"].T + p.get(f"{name}.bias", torch.zeros(()))
    inside = {name.removeprefix("experts."): t for name, t in p.items() if name.startswith("experts.")}
    z = lin("fc1_latent_proj", x) if config.moe_latent_size else x
    y = naive.experts(inside, z, route(p, x, config)._replace(mask=mask), config)
    y = lin("fc2_latent_proj", y) if config.moe_latent_size else y
    if config.n_shared_experts:
        u = lin("shared_experts.up_proj", x)
        if config.shared_expert_activation == "swiglu":
            u = torch.cat([lin("shared_experts.gate_proj", x), u], -1)
        shared = replace(config, expert_activation=config.shared_expert_activation)
        s = lin("shared_experts.down_proj", torch.stack([naive.act(row, shared) for row in u]))
        y = y + (naive.sigmoid(lin("shared_expert_gate", x)) * s if config.shared_expert_gate else s)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_its_sentence(name: str, masked: bool, backend: str) -> None:
    config, x = CONFIGS[name], tokens(2, 5)
    params, mask = draw(config), tokens(2, 5)[..., 0] < 0.3 if masked else None
    y = moe(MappingProxyType(params), x, config, backend=backend, mask=mask)
    flat = None if mask is None else mask.flatten()
    torch.testing.assert_close(y, expected(params, x.flatten(0, 1), config, flat).view(2, 5, 6))


@pytest.mark.parametrize("name", CONFIGS)
def test_differentiates(name: str) -> None:
    config, x, params = CONFIGS[name], tokens(3), draw(CONFIGS[name])
    grads = torch.func.grad(lambda p: moe(p, x, config).square().sum())(params)
    wanted = torch.func.grad(lambda p: expected(p, x, config, None).square().sum())(params)
    for key in params:
        torch.testing.assert_close(grads[key], wanted[key])


@pytest.mark.parametrize("lead", [(), (4,), (2, 0), (0,), (2, 3, 2)], ids=str)
def test_leading_axes(lead: tuple[int, ...]) -> None:
    config = CONFIGS["shared, gated"]
    params, x = draw(config), tokens(*lead)
    y = moe(params, x, config)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 6), moe(params, x.reshape(-1, 6), config))


@pytest.mark.parametrize("name", ["plain", "latent, relu2", "biases"])
def test_nan_in_a_masked_token_reaches_no_gradient(name: str) -> None:
    """Of what is masked: router, latent projections and experts; shared experts see every token."""
    config = replace(CONFIGS[name], n_shared_experts=0)
    mask = torch.tensor([True, False, True, True])

    def run(value: float) -> tuple[Tensor, ...]:
        params = {key: p.requires_grad_() for key, p in draw(config).items()}
        x = tokens(4).masked_fill(~mask[:, None], value).requires_grad_()
        y = moe(params, x, config, mask=mask)
        y.square().sum().backward()
        return (y.detach(), *(t.grad for t in [x, *params.values()] if t.grad is not None))

    poisoned, clean = run(torch.nan), run(0.0)
    assert len(clean) == 2 + len(draw(config))
    for found, wanted in zip(poisoned, clean, strict=True):
        assert found.isfinite().all() and torch.equal(found, wanted)


def test_all_masked_leaves_the_shared_expert() -> None:
    config, x = CONFIGS["shared"], tokens(5)
    params = {key: p.requires_grad_() for key, p in draw(config).items()}
    nobody = torch.zeros(5, dtype=torch.bool)
    y = moe(params, x, config, mask=nobody)
    torch.testing.assert_close(y, expected(params, x, config, nobody))
    y.sum().backward()
    zero = [key for key, p in params.items() if p.grad is not None and not p.grad.any()]
    assert zero == ["gate.weight", "experts.gate_and_up_projs", "experts.down_projs"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_dtype_comes_back(name: str, dtype: torch.dtype) -> None:
    """fp32 parameters, any x."""
    config, params, x = CONFIGS[name], draw(CONFIGS[name], torch.float32), tokens(5).to(dtype)
    y = moe(params, x, config)
    wanted = moe(params, x.float(), config)
    assert y.dtype == dtype
    assert (y - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()


def wrong(match: str, params: dict[str, Tensor], x: Tensor, config: MoEConfig, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=match):
        moe(params, x, config, **kwargs)


def test_errors() -> None:
    plain, shared = draw(CONFIG), CONFIGS["shared, gated"]
    full, x = draw(shared), tokens(5)
    without = lambda name: {key: p for key, p in full.items() if key != name}
    wrong(r"unknown parameter 'shared_expert.up_proj.weight'", full | {"shared_expert.up_proj.weight": x}, x, shared)
    wrong(r"unknown parameter 'norm.weight'", plain | {"norm.weight": x}, x, CONFIG)
    wrong(r"unknown parameter 'scale'", plain | {"experts.scale": x}, x, CONFIG)
    wrong(r"'gate.weight' is missing", {key: p for key, p in plain.items() if key != "gate.weight"}, x, CONFIG)
    wrong(r"'shared_experts.up_proj.weight' is missing, expected shape \[S=5, D=6\]", plain, x, shared)
    wrong(r"'shared_experts.gate_proj.weight' is missing", without("shared_experts.gate_proj.weight"), x, shared)
    wrong(
        r"'shared_expert_gate.weight' is missing, expected shape \[1, D=6\]",
        without("shared_expert_gate.weight"),
        x,
        shared,
    )
    wrong(r"'fc1_latent_proj.weight' is missing, expected shape \[L=4", plain, x, replace(CONFIG, moe_latent_size=4))
    bad = full | {"shared_experts.down_proj.weight": torch.ones(5, 6)}
    wrong(r"'shared_experts.down_proj.weight' has shape \[5, 6\], expected \[D=6, S=5\]", bad, x, shared)
    wrong(
        r"shared_expert_activation is 'geglu', expected one of swiglu, relu2",
        full,
        x,
        replace(shared, shared_expert_activation="geglu"),
    )
    wrong(r"x has shape \[5, 5\], expected \[.., D=6\]", plain, x[:, :5], CONFIG)
    wrong(
        r"mask is torch.bool \[4\], expected torch.bool \[5\]", plain, x, CONFIG, mask=torch.ones(4, dtype=torch.bool)
    )
