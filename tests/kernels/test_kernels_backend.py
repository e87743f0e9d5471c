"""fmoe's Triton backend against its reference backend: every activation, weighting and bias of a config."""

from dataclasses import replace
from itertools import product

import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from naive import draw, grads_of, near, tokens
from torch import Tensor

from fmoe.activations import ACTIVATIONS
from fmoe.backends.loop import loop
from fmoe.backends.products import gmm
from fmoe.backends.triton import fused, triton
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=12, moe_inter_dim=9, activation_limit=1.5)
ACTS = [dict(expert_activation=name) for name in ACTIVATIONS] + [dict(swiglu_limit=0.7)]
MODES = [
    pytest.param(replace(CONFIG, **act, expert_bias=bias, apply_router_weight_after_down=after), id=f"{i}{bias}{after}")
    for (i, act), (bias, after) in product(enumerate(ACTS), [(False, False), (True, False), (True, True)])
]


def device(t: Tensor) -> Tensor:
    return t.to(kernel_cases.DEVICE)


@pytest.mark.parametrize("config", MODES)
def test_rows_and_fused_are_the_loop(config: MoEConfig) -> None:
    x, routing = tokens(config, dtype=torch.float32)
    params = {name: device(p) for name, p in draw(config, torch.float32).items()}
    parts = (routing.indices, routing.weights.float(), routing.mask)
    x, routing = device(x), Routing(*(t if t is None else device(t) for t in parts))
    y, grads = grads_of(experts, params, x, routing, config=config, backend=loop)
    whole = lambda *args, config: fused(*args, config)
    for found in (
        grads_of(experts, params, x, routing, config=config, backend=triton),
        grads_of(whole, params, x, routing, config=config),
    ):
        near(found[0], y, 1e-6)
        for name in grads:
            near(found[1][name], grads[name], 2e-6)


@pytest.mark.parametrize("after", [False, True])
def test_lora_goes_through_the_kernels_too(after: bool) -> None:
    config = replace(CONFIG, apply_router_weight_after_down=after)
    (E, D, U), I, r = (4, 12, 18), 9, 3
    shapes = {"lora_gate_and_up_A": (E, D, r), "lora_gate_and_up_B": (E, r, U)}
    shapes |= {"lora_down_A": (E, I, r), "lora_down_B": (E, r, D)}
    params = {name: device(p) for name, p in draw(config, torch.float32).items()}
    torch.manual_seed(0)
    params |= {name: device(0.3 * torch.randn(shape)) for name, shape in shapes.items()}
    x, routing = tokens(config, dtype=torch.float32)
    parts = (routing.indices, routing.weights.float(), routing.mask)
    x, routing = device(x), Routing(*(t if t is None else device(t) for t in parts))
    y, grads = grads_of(experts, params, x, routing, config=config, backend=loop)
    found, theirs = grads_of(experts, params, x, routing, config=config, backend="triton")
    near(found, y, 1e-6)
    for name in grads:
        near(theirs[name], grads[name], 2e-6)


def test_what_vjp_returns_runs_where_nobody_records() -> None:
    """What the transform wrapped has outlived it: a tensor with no data of its own, which no kernel can read."""
    x, w, dy = (device(torch.randn(shape)) for shape in [(6, 4), (2, 4, 3), (6, 3)])
    offsets = device(torch.tensor([2, 6]).int())
    _, vjp = torch.func.vjp(lambda x, w: gmm(x, w, offsets, "triton"), x, w)
    with torch.no_grad():
        found = vjp(dy)
    for a, b in zip(found, vjp(dy), strict=True):
        assert torch.equal(a, b)
