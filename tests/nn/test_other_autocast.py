"""A backward that stands in another autocast than its forward, or in none: the gradients of one beside it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_cases import CONFIG as LORA
from layer_cases import PARAMS, ROUTING, X
from torch import Tensor, nn

import fmoe
from fmoe.activations import ACTIVATIONS
from fmoe.nn import MoE

B, H, F = torch.bfloat16, torch.float16, torch.float32
BASE = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32")
GROUPS = dict(n_expert_groups=2, n_limited_groups=1)
CONFIGS: dict[str, dict[str, Any]] = {
    "bare": {},
    "bias": dict(expert_bias=True),
    "after": dict(apply_router_weight_after_down=True),
    "before": dict(apply_router_weight_before_up=True),
    "norm": dict(expert_norm_eps=1e-6),
    "shared": dict(n_shared_experts=1, shared_expert_gate=True),
    "shared relu2": dict(n_shared_experts=1, shared_expert_activation="relu2"),
    "latent": dict(moe_latent_size=4, latent_norm="before"),
    "sigmoid": dict(score_func="sigmoid", norm_topk_prob=True, **GROUPS),
    "groups": dict(score_func="softmax_in_groups", **GROUPS),
    "mixed": dict(score_func="sparsemixer"),
    "normed": dict(router_norm=True, logit_softcap=2.0),
    "loss": dict(aux_loss_coeff=0.1),
    "zero experts": dict(n_zero_experts=2),
    **{name: dict(expert_activation=name, expert_bias=True) for name in ACTIVATIONS},
}
PAIRS = ((B, H), (H, B), (None, B), (None, H), (B, None))


def inside(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype or B, enabled=dtype is not None)


def alike(y: Tensor, of: list[Tensor], at: torch.dtype | None, made: torch.dtype | None) -> None:
    """In the autocast `at`, the gradients that there are in that of the forward, `made`."""
    with inside(made):
        right = torch.autograd.grad(y, of, retain_graph=True, allow_unused=True)
    with inside(at):
        found = torch.autograd.grad(y, of, allow_unused=True)
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05 * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
@pytest.mark.parametrize("row", CONFIGS)
def test_a_block(row: str, dtype: torch.dtype, backend: str) -> None:
    for (made, at), masked in ((pair, masked) for pair in PAIRS for masked in (False, True)):
        torch.manual_seed(0)
        block = MoE(replace(BASE, **CONFIGS[row], dtype=dtype), backend)
        for p in block.parameters():
            nn.init.normal_(p, std=0.5)
        x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
        with inside(made):
            y = block(x, torch.rand(2, 5) < 0.7 if masked else None).sum()
        alike(y, [x, *block.parameters()], at, made)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["loop", "torch_mm", "triton"])
def test_experts_with_lora(backend: str, recompute: bool) -> None:
    for made, at in PAIRS:
        if backend == "triton" and made == B:  # Triton's interpreter multiplies none
            continue
        params = {n: p.clone().requires_grad_() for n, p in PARAMS.items()}
        x = X.clone().requires_grad_()
        with inside(made):
            y = fmoe.experts(params, x, ROUTING, LORA, backend=backend, recompute=recompute).sum()
        alike(y, [x, *params.values()], at, made)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [F, B, H], ids=str)
def test_transforms(dtype: torch.dtype, recompute: bool) -> None:
    config = replace(BASE, expert_bias=True)
    torch.manual_seed(0)
    params = {n: torch.randn_like(t) for n, t in fmoe.nn.GroupedExperts(config).state_dict().items()}
    x, routing = torch.randn(6, 8).to(dtype), fmoe.Routing(torch.randint(0, 4, (6, 2)), torch.rand(6, 2))
    run = lambda x: fmoe.experts(params, x, routing, config, recompute=recompute)
    for f in (run, torch.vmap(lambda row: run(row.expand_as(x)))):
        y, back = torch.func.vjp(f, x)
        right = back(torch.ones_like(y))[0]
        for at in (B, H):
            with inside(at):
                assert torch.equal(back(torch.ones_like(y))[0], right)
