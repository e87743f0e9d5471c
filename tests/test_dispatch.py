"""The laws of a dispatcher, over random routings."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmoe.dispatch import Dispatcher
from fmoe.dispatch.local import local
from fmoe.types import MoEConfig, Routing

DISPATCHERS = {"local": local}


class Case(NamedTuple):
    """A routing with masked, negative, foreign and repeated experts, x [T, D], and n [T] experts for each token."""

    routing: Routing
    config: MoEConfig
    x: Tensor
    n: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    T, K, E, D = (draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    ids = draw(st.lists(st.sampled_from([-1, *range(E), E, E + 100]), min_size=T * K, max_size=T * K))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=T, max_size=T).map(torch.BoolTensor))
    indices = torch.tensor(ids, dtype=torch.int64).view(T, K)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(T, D, dtype=torch.float64, generator=generator)
    weights = torch.rand(T, K, dtype=torch.float64, generator=generator)
    n = ((indices >= 0) & (indices < E) & (True if mask is None else mask[:, None])).sum(1)
    config = MoEConfig(n_routed_experts=E, n_activated_experts=min(E, K), dim=D, moe_inter_dim=1)
    return Case(Routing(indices, weights, mask), config, x, n)


laws = settings(deadline=None, max_examples=60)
each = pytest.mark.parametrize("comm", DISPATCHERS.values(), ids=DISPATCHERS)


@each
@laws
@given(case=cases())
def test_transposes(comm: Dispatcher, case: Case) -> None:
    """<dispatch(x), r> == <x, combine(r)>, and each is the other's backward."""
    plan = comm.plan(case.routing, case.config)
    x = case.x.clone().requires_grad_()
    rows = comm.dispatch(x, case.routing.weights, plan)
    r = torch.randn(rows.x.shape, dtype=torch.float64).requires_grad_()
    y = comm.combine(r, plan)
    torch.testing.assert_close((rows.x * r).sum(), (x * y).sum())
    torch.testing.assert_close(torch.autograd.grad(rows.x, x, r)[0], y)
    torch.testing.assert_close(torch.autograd.grad(y, r, x)[0], rows.x)


@each
@laws
@given(case=cases())
def test_combine_of_dispatch_counts_the_copies(comm: Dispatcher, case: Case) -> None:
    plan = comm.plan(case.routing, case.config)
    rows = comm.dispatch(case.x, case.routing.weights, plan)
    torch.testing.assert_close(comm.combine(rows.x, plan), case.n[:, None] * case.x)
    assert int(rows.counts.sum()) == len(rows.x) == len(rows.weights) == int(case.n.sum())


@each
@laws
@given(case=cases())
def test_rows_are_sorted_by_expert_and_carry_their_weight(comm: Dispatcher, case: Case) -> None:
    plan = comm.plan(case.routing, case.config)
    indices, weights, mask = case.routing
    token = torch.arange(len(case.x), dtype=torch.float64)[:, None]
    rows = comm.dispatch(token, weights, plan)
    expert = torch.arange(case.config.n_routed_experts).repeat_interleave(rows.counts)
    found = sorted(zip(rows.x[:, 0].tolist(), expert.tolist(), rows.weights.tolist(), strict=True))
    sent = [
        (t, int(indices[t, k]), float(weights[t, k]))
        for t in range(len(case.x))
        for k in range(indices.shape[1])
        if 0 <= indices[t, k] < case.config.n_routed_experts and (mask is None or mask[t])
    ]
    assert found == sorted(sent)


@each
def test_sums_are_fp32_in_both_directions(comm: Dispatcher) -> None:
    """256 + 1 + 1 is 256 when bf16 rounds after every addition, 258 in fp32."""
    config = MoEConfig(n_routed_experts=3, n_activated_experts=3, dim=1, moe_inter_dim=1)
    plan = comm.plan(Routing(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)), config)
    r = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    y = comm.combine(r, plan)
    assert y.dtype == torch.float32 and y.item() == 258
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = comm.dispatch(x, torch.ones(1, 3, dtype=torch.bfloat16), plan)
    assert rows.x.dtype == torch.bfloat16 and rows.weights.dtype == torch.float32
    assert torch.autograd.grad(rows.x, x, r)[0].item() == 258


@each
def test_a_plan_is_a_value(comm: Dispatcher) -> None:
    """The same plan gives the same rows, and holds no gradient."""
    config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=3, moe_inter_dim=1)
    routing = Routing(torch.randint(0, 4, (50, 2)), torch.rand(50, 2, requires_grad=True))
    plan, x = comm.plan(routing, config), torch.randn(50, 3)
    first, second = (comm.dispatch(x, routing.weights, plan) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in plan)
