"""fp16: what routing weights above 1 make too large is y alone, as where they multiply what comes out of an expert."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE

import fmoe

E, D, I, T, K = 4, 64, 32, 24, 2
CONFIG = fmoe.MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)


def eager(params, x, routing):
    """As Transformers computes experts, one by one, in the dtype of x or of autocast."""
    y = torch.zeros_like(x)
    for e in range(E):
        t, k = (routing.indices == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[t], params["gate_and_up_projs"][e].mT).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, params["down_projs"][e].mT) * routing.weights[t, k, None]
        y.index_add_(0, t, out.to(y.dtype))
    return y


def drawn(most):
    torch.manual_seed(0)
    params = {"gate_and_up_projs": torch.randn(E, D, 2 * I) * 0.05, "down_projs": torch.randn(E, I, D) * 0.02}
    indices = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    params, x = {n: p.to(DEVICE) for n, p in params.items()}, torch.randn(T, D) * 300
    return params, x.to(DEVICE), fmoe.Routing(indices.to(DEVICE), (torch.rand(T, K) * most).to(DEVICE))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["loop", "torch_mm", "triton"])
def test_what_is_finite_one_expert_after_the_other_is_finite_here(backend, autocast):
    params, x, routing = drawn(8)
    if not autocast:
        params, x = {n: p.half() for n, p in params.items()}, x.half()
    with torch.autocast(torch.device(DEVICE).type, torch.float16, enabled=autocast):
        expected, found = eager(params, x, routing), fmoe.experts(params, x, routing, CONFIG, backend=backend)
    finite = expected.isfinite()
    assert finite.sum() > T and found.dtype == x.dtype and found[finite].isfinite().all()
    half = {n: p.half().double() for n, p in params.items()}
    exact = fmoe.experts(half, x.half().double(), routing, CONFIG, backend="loop")
    torch.testing.assert_close(found[finite].double(), exact[finite], rtol=0.02, atol=20)


@pytest.mark.parametrize("backend", ["torch_mm", "triton"])
def test_a_weight_of_no_expert_and_of_no_token_says_nothing(backend):
    params, x, routing = drawn(1)
    params, x = {n: p.half() for n, p in params.items()}, (x / 300).half()
    indices, weights = routing.indices.clone(), routing.weights.clone()
    indices[0, 1], weights[0, 1] = -1, 1e30
    indices[1, 1], weights[1, 1] = E, float("nan")
    mask = torch.ones(T, dtype=torch.bool, device=DEVICE)
    mask[2], weights[2] = False, float("inf")
    found = fmoe.experts(params, x, fmoe.Routing(indices, weights, mask), CONFIG, backend=backend)
    clean = torch.where(weights.isfinite() & (weights < 1e9), weights, 0.0)
    expected = fmoe.experts(params, x, fmoe.Routing(indices, clean, mask), CONFIG, backend=backend)
    assert torch.equal(found, expected) and found.isfinite().all() and not found[2].any()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_weights_as_they_are(recompute):
    params, x, routing = drawn(5)
    params, x = {n: p.half().requires_grad_() for n, p in params.items()}, (x / 300).half().requires_grad_()
    weights = routing.weights.clone().requires_grad_()
    given = (*params.values(), x, weights)
    y = fmoe.experts(params, x, routing._replace(weights=weights), CONFIG, recompute=recompute)
    wide = [t.detach().double().requires_grad_() for t in given]
    named = dict(zip(params, wide, strict=False))
    exact = fmoe.experts(named, wide[-2], routing._replace(weights=wide[-1]), CONFIG)
    for found, expected in zip(
        torch.autograd.grad(y.float().square().sum(), given),
        torch.autograd.grad(exact.square().sum(), wide),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
