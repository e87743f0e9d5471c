"""What `experts` is given: id dtypes, fp64 weights, autocast, vmap, meta tensors, batch invariance."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from layer_cases import ALL, CONFIG, PARAMS, ROUTING, X, every_backend
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fmoe
from fmoe import MoEConfig, Routing
from fmoe.types import EXPERT_ACTIVATIONS, INTEGERS


@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_mean_the_same_in_every_integer_dtype(dtype: torch.dtype, backend: str) -> None:
    """E is one more than the dtype holds, or 300."""
    E = min(torch.iinfo(dtype).max + 1, 300)
    config = replace(CONFIG, n_routed_experts=E, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_bias=False)
    config = replace(config, expert_activation="relu2")
    params = {"gate_and_up_projs": torch.ones(E, 1, 1), "down_projs": torch.arange(1, E + 1).float().view(E, 1, 1)}
    ids = torch.tensor([[0], [5], [100], [E - 1]])
    routing = Routing(ids.to(dtype), torch.ones(4, 1))
    assert fmoe.experts(params, torch.ones(4, 1), routing, config, backend=backend).flatten().tolist() == [1, 6, 101, E]
    plan = fmoe.dispatch.local.plan(routing, config)
    assert plan.counts.nonzero().flatten().tolist() == [0, 5, 100, E - 1]


def grads(f: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Any]:
    y, vjp = torch.func.vjp(f, *args)
    return y, vjp(torch.ones_like(y))


@every_backend
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_fp64_weights_beside_narrower_tokens(with_lora: bool, after: bool, backend: str) -> None:
    config = replace(CONFIG, apply_router_weight_after_down=after)
    params = {n: p for n, p in PARAMS.items() if with_lora or "lora" not in n}
    run = lambda p, x, w, by: fmoe.experts(p, x, ROUTING._replace(weights=w), config, backend=by)
    double = {n: p.double() for n, p in params.items()}, X.double(), ROUTING.weights
    (want, wanted), (found, got) = (
        grads(lambda *a, b=b: run(*a, b), *args) for b, args in (("loop", double), (backend, (params, X, double[2])))
    )
    naive.near(found, want, 1e-6)
    assert found.dtype == torch.float32 and got[2].dtype == torch.float64
    naive.near(got[2], wanted[2], 1e-5)
    for name in params:
        naive.near(got[0][name], wanted[0][name], 1e-5)


@every_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("names", [("gate_and_up_projs", "down_projs"), tuple(PARAMS)], ids=["plain", "lora"])
def test_a_backward_inside_another_autocast_is_that_outside(
    names: tuple[str, ...], recompute: bool, backend: str
) -> None:
    config = replace(CONFIG, expert_bias="down_proj_bias" in names)

    def run(during: bool) -> list[Tensor]:
        params = {n: PARAMS[n].clone().requires_grad_() for n in names}
        y = fmoe.experts(params, X, ROUTING, config, backend=backend, recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=during):
            y.square().sum().backward()
        return [p.grad for p in params.values()]  # type: ignore[misc]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


@every_backend
def test_autocast_rounds_y_to_its_own_dtype_once(backend: str) -> None:
    config = MoEConfig(n_routed_experts=2, n_activated_experts=2, dim=1, moe_inter_dim=1, expert_activation="relu2")
    params = dict(gate_and_up_projs=torch.ones(2, 1, 1), down_projs=torch.full((2, 1, 1), 40000.0))
    routing = Routing(torch.tensor([[0, 1]]), torch.ones(1, 2))
    with torch.autocast("cpu", torch.float16):
        y = fmoe.experts(params, torch.ones(1, 1), routing, config, backend=backend)
    assert y.dtype == torch.float32 and y.item() == 80000


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_lora", [False, True])
def test_vmap_over_routings_of_some_and_of_no_members(with_lora: bool, dtype: torch.dtype, backend: str) -> None:
    params = {n: p.to(dtype) for n, p in PARAMS.items() if with_lora or "lora" not in n}
    x, weights = X.to(dtype), ROUTING.weights.to(dtype)
    run = lambda x, i, w: fmoe.experts(params, x, Routing(i, w, ROUTING.mask), CONFIG, backend=backend)
    indices = torch.stack([ROUTING.indices, (ROUTING.indices + 1) % 5])
    args = torch.stack([x, -x]), indices, torch.stack([weights, 1 - weights])
    found = torch.vmap(run)(*args)
    naive.near(found, torch.stack([run(*(a[i] for a in args)) for i in (0, 1)]), 1e-6)
    none = torch.vmap(run)(*(a[:0] for a in args))
    assert none.shape == (0, *x.shape) and none.dtype == dtype
    square = lambda *a: run(*a).square().sum()
    assert torch.vmap(torch.func.grad(square))(*(a[:0] for a in args)).shape == (0, *x.shape)


@every_backend
@pytest.mark.parametrize("with_lora", [False, True])
def test_meta_and_fake_tensors_give_shapes_and_flops_of_no_data(with_lora: bool, backend: str) -> None:
    """A layer of a 1 T model: what it needs is known before it exists."""
    E, D, I, K, T = 384, 7168, 2048, 8, 4096
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)
    shapes = {"gate_and_up_projs": (E, D, 2 * I), "down_projs": (E, I, D)}
    shapes |= {"lora_down_A": (E, I, 16), "lora_down_B": (E, 16, D)} if with_lora else {}
    layer = T * K * 2 * (3 * D * I + (16 * (I + D) if with_lora else 0))

    def run(device: str) -> None:
        made = lambda *s, dtype=torch.bfloat16: torch.empty(s, dtype=dtype, device=device)
        params = {f"experts.{n}": made(*s).requires_grad_() for n, s in shapes.items()}
        params["gate.weight"] = made(E, D).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = fmoe.moe(params, made(T, D).requires_grad_(), config, backend=backend)
        assert y.shape == (T, D) and y.dtype == torch.bfloat16 and y.device.type == device
        assert counter.get_total_flops() == layer + 2 * T * D * E
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * (layer + 2 * T * D * E)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in params.values())

    run("meta")
    with FakeTensorMode():
        run("cpu")


@pytest.mark.parametrize(
    ("backend", "activation", "dtype"),
    [
        *((by, act, d) for by in ALL[:2] for act in EXPERT_ACTIVATIONS for d in (torch.float32, torch.bfloat16)),
        pytest.param("triton", "swiglu", torch.float32, marks=pytest.mark.slow),  # the kernels' own test has it too
    ],
    ids=str,
)
def test_batch_invariant_a_token_does_not_depend_on_its_neighbours(
    dtype: torch.dtype, activation: str, backend: str
) -> None:
    T = 12 if backend == "triton" else 24
    config = MoEConfig(
        n_routed_experts=6, n_activated_experts=3, dim=33, moe_inter_dim=37, expert_activation=activation, dtype=dtype
    )
    params = naive.draw(config, dtype)
    x, routing = naive.tokens(config, T=T, dtype=dtype)
    run = lambda rows: fmoe.experts(
        params, x[rows], Routing(*(t[rows] for t in routing)), config, backend=backend, batch_invariant=True
    )
    whole = run(slice(None))
    for rows in (slice(7, 8), slice(3, 9), torch.randperm(T, generator=torch.Generator().manual_seed(0))):
        assert torch.equal(run(rows), whole[rows])
    near = fmoe.experts(params, x, routing, config, backend=backend)
    naive.near(whole, near, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", [*ALL[:2], pytest.param("triton", marks=pytest.mark.slow)])  # a minute
def test_batch_invariance_differentiates_and_holds_with_lora_and_no_tokens(backend: str) -> None:
    run = lambda inv: grads(
        lambda p, x, w: fmoe.experts(
            p, x, ROUTING._replace(weights=w), CONFIG, backend=backend, batch_invariant=inv
        ),
        PARAMS, X, ROUTING.weights.float(),
    )  # fmt: skip
    (y, (found, dx, dw)), (y2, (wanted, dx2, dw2)) = run(True), run(False)
    for a, b in zip([y, dx, dw, *found.values()], [y2, dx2, dw2, *wanted.values()], strict=True):
        naive.near(a, b, 1e-5)
    alone = fmoe.experts(
        PARAMS, X[2:3], Routing(*(t[2:3] for t in ROUTING)), CONFIG, backend=backend, batch_invariant=True
    )
    naive.near(alone, y[2:3], 1e-6)
    none = Routing(*(t[:0] for t in ROUTING))
    assert fmoe.experts(PARAMS, X[:0], none, CONFIG, backend=backend, batch_invariant=True).shape == (0, 6)
