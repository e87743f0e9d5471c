"""The laws of a dispatcher, over random routings of every rank of a group."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dispatchers import DISPATCHERS, OVER_GROUPS
from hypothesis import given
from routings import Case, cases, everywhere, laws, lone
from torch import Tensor
from torch.utils import _pytree as pytree

import fmoe
from fmoe.dispatch import Dispatcher
from fmoe.types import MoEConfig, Routing

each = pytest.mark.parametrize(
    "name, R", [(name, R) for name in DISPATCHERS for R in ([1, 2, 4] if name in OVER_GROUPS else [1])]
)


@each
@laws
@given(draw=cases())
def test_transposes(name: str, R: int, draw: Callable[[int], list[Case]]) -> None:
    """<dispatch(x), r> == <x, combine(r)> over all ranks, and each is the other's backward, to the second order."""

    def law(comm: Dispatcher, case: Case) -> tuple[Tensor, Tensor]:
        plan = comm.plan(case.routing, case.config)
        x, w = case.x.clone().requires_grad_(), case.routing.weights.clone().requires_grad_()
        rows = comm.dispatch(x, w, plan)
        r, s = torch.randn(rows.x.shape).double().requires_grad_(), torch.randn(rows.weights.shape).double()
        y = comm.combine(r, plan)
        dx, dw = torch.autograd.grad([rows.x, rows.weights], [x, w], [r, s], create_graph=True)
        torch.testing.assert_close(dx, y)
        torch.testing.assert_close(torch.autograd.grad(y, r, x, retain_graph=True)[0], rows.x)
        torch.testing.assert_close(torch.autograd.grad(dx, r, x)[0], rows.x)
        return (rows.x * r).sum() + (rows.weights * s).sum(), (x * y).sum() + (w * dw).sum()

    left, right = zip(*everywhere(name, draw(R), law), strict=True)
    torch.testing.assert_close(sum(left), sum(right))


@each
@laws
@given(draw=cases())
def test_combine_of_dispatch_counts_the_copies(name: str, R: int, draw: Callable[[int], list[Case]]) -> None:
    def law(comm: Dispatcher, case: Case) -> int:
        plan = comm.plan(case.routing, case.config)
        rows = comm.dispatch(case.x, case.routing.weights, plan)
        torch.testing.assert_close(comm.combine(rows.x, plan), case.n[:, None] * case.x)
        assert rows.counts.shape == (case.config.n_routed_experts // R,)
        assert int(rows.counts.sum()) == len(rows.x) == len(rows.weights)
        return len(rows.x)

    drawn = draw(R)
    assert sum(everywhere(name, drawn, law)) == sum(int(case.n.sum()) for case in drawn)


@each
@laws
@given(draw=cases())
def test_rows_are_sorted_by_expert_and_carry_their_weight(name: str, R: int, draw: Callable[[int], list[Case]]) -> None:
    """And of one expert, by rank and then by slot: the order of one device."""
    drawn = [case._replace(config=replace(case.config, dim=1)) for case in draw(R)]
    first = [sum(len(case.x) for case in drawn[:rank]) for rank in range(R)]

    def law(comm: Dispatcher, case: Case) -> list[tuple[int, float, float]]:
        rank = next(rank for rank in range(R) if drawn[rank] is case)
        plan = comm.plan(case.routing, case.config)
        token = first[rank] + torch.arange(len(case.x), dtype=torch.float64)[:, None]
        rows = comm.dispatch(token, case.routing.weights, plan)
        expert = torch.arange(len(rows.counts)).repeat_interleave(rows.counts) + rank * len(rows.counts)
        return list(zip(expert.tolist(), rows.x[:, 0].tolist(), rows.weights.tolist(), strict=True))

    sent = [
        (int(indices[t, k]), float(first[rank] + t), float(weights[t, k]))
        for rank, ((indices, weights, mask), config, x, _) in enumerate(drawn)
        for t in range(len(x))
        for k in range(indices.shape[1])
        if 0 <= indices[t, k] < config.n_routed_experts and (mask is None or mask[t])
    ]
    found = [row for rows in everywhere(name, drawn, law) for row in rows]
    assert found == sorted(sent, key=lambda row: row[:1])


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_plan_is_a_value(name: str) -> None:
    """The same plan gives the same rows; it is a pytree, and holds integers alone: no gradient, group or buffer."""
    routing = Routing(torch.randint(0, 4, (50, 2)), torch.rand(50, 2, requires_grad=True))

    def law(comm: Dispatcher, case: Case) -> None:
        plan = comm.plan(case.routing, case.config)
        leaves, spec = pytree.tree_flatten(plan)
        again = pytree.tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in leaves], spec)
        first, second = (comm.dispatch(case.x, routing.weights, p) for p in (plan, again))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        assert tensors and all(t.dtype == torch.int64 and not t.requires_grad for t in tensors)

    everywhere(name, lone(routing, torch.randn(50, 3), E=4), law)


def test_local_is_a_dispatcher_under_its_name() -> None:
    with fmoe.dispatch.local as d:
        assert d is fmoe.dispatch.local and isinstance(d, Dispatcher)
    mine = Dispatcher(d.plan, d.dispatch, d.combine)  # three functions are enough
    mine.close()


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_more_experts_than_the_first_message_has_room_for(name: str) -> None:
    R, E, T = 2, 1500, 400
    config = MoEConfig(n_routed_experts=E, n_activated_experts=2, dim=2, moe_inter_dim=1, dtype=torch.float64)
    ids = torch.arange(2 * T * R).mul(7).remainder(E).view(R, T, 2)
    drawn = [Case(Routing(i, torch.ones(T, 2)), config, torch.randn(T, 2).double(), torch.ones(T)) for i in ids]

    def law(comm: Dispatcher, case: Case) -> Tensor:
        plan = comm.plan(case.routing, case.config)
        rows = comm.dispatch(case.x, case.routing.weights, plan)
        torch.testing.assert_close(comm.combine(rows.x, plan), 2 * case.x)
        return rows.counts

    assert torch.equal(torch.cat(everywhere(name, drawn, law)), ids.flatten().bincount(minlength=E))
