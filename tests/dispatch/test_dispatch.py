"""The laws of a dispatcher, over random routings of every rank of a group."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import naive
import pytest
import threads
import torch
from dispatchers import CONFIG, DISPATCHERS, OVER_GROUPS, WAYS, batch, grads, of_rank, share
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import fmoe
from fmoe.dispatch import Dispatcher
from fmoe.types import MoEConfig, Routing


class Case(NamedTuple):
    """A routing with masked, negative, foreign and repeated experts, x [T, D], and n [T] experts for each token."""

    routing: Routing
    config: MoEConfig
    x: Tensor
    n: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Callable[[int], list[Case]]:
    """One case for each of R ranks, of one config."""
    K, D, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 6), min_size=4, max_size=4))
    masks = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    seed, wild = draw(st.integers(0, 9999)), draw(st.booleans())

    def one(rank: int, R: int) -> Case:
        T, E, generator = lengths[rank], per_rank * R, torch.Generator().manual_seed(seed + rank)
        ids = torch.tensor([*range(E), *([-1, E, E + 100] if wild else [])])
        indices = ids[torch.randint(0, len(ids), (T, K), generator=generator)]
        mask = torch.rand(T, generator=generator) < 0.7 if masks[rank] else None
        x = torch.randn(T, D, dtype=torch.float64, generator=generator)
        weights = torch.rand(T, K, dtype=torch.float64, generator=generator)
        n = ((indices >= 0) & (indices < E) & (True if mask is None else mask[:, None])).sum(1)
        config = MoEConfig(
            n_routed_experts=E, n_activated_experts=min(E, K), dim=D, moe_inter_dim=1, dtype=torch.float64
        )
        return Case(Routing(indices, weights, mask), config, x, n)

    return lambda R: [one(rank, R) for rank in range(R)]


laws = settings(deadline=None, max_examples=40)
each = pytest.mark.parametrize(
    "name, R", [(name, R) for name in DISPATCHERS for R in ([1, 2, 4] if name in OVER_GROUPS else [1])]
)


def everywhere(name: str, cases: list[Case], law: Callable[[Dispatcher, Case], Any]) -> list[Any]:
    """[law(dispatcher, case) on each rank]."""

    def run() -> Any:
        with DISPATCHERS[name](None) as comm:
            return law(comm, cases[torch.distributed.get_rank() if name in OVER_GROUPS else 0])

    return threads.run(run, len(cases)) if name in OVER_GROUPS else [run()]


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


def lone(routing: Routing, x: Tensor, E: int) -> list[Case]:
    config = MoEConfig(n_routed_experts=E, n_activated_experts=1, dim=x.shape[1], moe_inter_dim=1, dtype=x.dtype)
    return [Case(routing, config, x, torch.ones(len(x)))]


@pytest.mark.parametrize("name", DISPATCHERS)
def test_sums_are_fp32_in_both_directions(name: str) -> None:
    """256 + 1 + 1 is 256 when bf16 rounds after every addition, 258 in fp32."""
    r = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)

    def law(comm: Dispatcher, case: Case) -> None:
        plan = comm.plan(case.routing, case.config)
        y = comm.combine(r, plan)
        assert y.dtype == torch.float32 and y.item() == 258
        x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
        rows = comm.dispatch(x, torch.ones(1, 3, dtype=torch.bfloat16), plan)
        assert rows.x.dtype == torch.bfloat16 and rows.weights.dtype == torch.float32
        assert torch.autograd.grad(rows.x, x, r)[0].item() == 258

    everywhere(name, lone(Routing(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)), r[:1], E=3), law)


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_sums_over_ranks_are_rounded_once(name: str) -> None:
    """256.75 on one rank and 0.75 on the other are 258 in bf16, but 256 if each rank rounds what it has."""
    values = torch.tensor([[[256.0], [0.75]], [[0.25], [0.5]]], dtype=torch.bfloat16)
    config = MoEConfig(n_routed_experts=4, n_activated_experts=4, dim=1, moe_inter_dim=1)
    routing = Routing(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4))
    none = Routing(*(t[:0] for t in routing[:2]))
    x = torch.ones(1, 1, dtype=torch.bfloat16)

    def law(comm: Dispatcher, case: Case) -> tuple[Tensor, Tensor]:
        plan, x = comm.plan(case.routing, config), case.x.clone().requires_grad_()
        r = values[torch.distributed.get_rank()]
        rows = comm.dispatch(x, case.routing.weights, plan)
        return comm.combine(r, plan), torch.autograd.grad(rows.x, x, r)[0]

    y, dx = everywhere(name, [Case(routing, config, x, x), Case(none, config, x[:0], x)], law)[0]
    assert y.item() == 257.5 and dx.item() == 258


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


@pytest.mark.parametrize("name, R", [("all_to_all", 2), ("all_to_all", 4), ("all_gather", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(laws, max_examples=15)
@given(draw=cases())
def test_sums_have_the_order_of_one_device(name: str, R: int, dtype: torch.dtype, draw: Any) -> None:
    """Bit by bit, forward and backward: of rows of any width and dtype, through a function that is not linear."""

    def law(comm: Dispatcher, case: Case) -> list[Tensor]:
        plan = comm.plan(case.routing, replace(case.config, dtype=dtype))
        x, w = case.x.to(dtype).requires_grad_(), case.routing.weights.to(dtype).requires_grad_()
        rows = comm.dispatch(x, w, plan)
        y = comm.combine(torch.tanh(rows.x + 1) * rows.weights[:, None], plan)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), (x, w))]

    drawn = draw(R)
    drawn = [c._replace(routing=c.routing._replace(weights=c.routing.weights.float())) for c in drawn]
    masks = [torch.ones(len(c.x), dtype=torch.bool) if c.routing.mask is None else c.routing.mask for c in drawn]
    whole = Routing(
        torch.cat([c.routing[0] for c in drawn]), torch.cat([c.routing[1] for c in drawn]), torch.cat(masks)
    )
    x = torch.cat([c.x for c in drawn])
    found = zip(*everywhere(name, drawn, law), strict=True)
    expected = law(fmoe.dispatch.local, drawn[0]._replace(routing=whole, x=x))
    assert all(torch.equal(torch.cat(parts), t) for parts, t in zip(found, expected, strict=True))


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


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_func_grad_is_backward(name: str) -> None:
    """torch.func sees through a dispatcher, with and without recomputation, and grad of grad too."""
    R = 2
    drawn = batch("uneven", R)

    def law(comm: Dispatcher, rank: int) -> None:
        x, r, *routed = of_rank((drawn.x, drawn.r, *drawn.routing), drawn.lengths, rank)
        routing, params = Routing(*routed), share(naive.draw(CONFIG), R, rank)
        right = grads(WAYS["plain"](comm), params, x, routing, r)
        for recompute in (False, True):

            def loss(params: dict[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
                how: Any = dict(dispatcher=comm, backend="loop", recompute=recompute)  # noqa: B023
                return (fmoe.experts(params, x, routing._replace(weights=weights), CONFIG, **how) * r).sum()

            dparams, dx, dw = torch.func.grad(loss, (0, 1, 2))(params, x, routing.weights)
            for key, t in {**dparams, "x": dx, "w": dw}.items():
                torch.testing.assert_close(t, right[key], rtol=1e-12, atol=1e-12)
        twice = torch.func.grad(lambda x: torch.func.grad(loss, 1)(params, x, routing.weights).square().sum())(x)
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(params, leaf, routing.weights), leaf, create_graph=True)
        torch.testing.assert_close(twice, torch.autograd.grad(dx.square().sum(), leaf)[0])

    def run() -> None:
        with DISPATCHERS[name](None) as comm:
            law(comm, torch.distributed.get_rank())

    threads.run(run, R)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 raises an internal error of Dynamo at the graph break"
)
@pytest.mark.parametrize("name", OVER_GROUPS)
@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, where a graph ends
def test_a_compiler_leaves_the_graph_and_loses_nothing(name: str, recompute: bool) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _, x, routing, r = batch("uneven", 1)
        with DISPATCHERS[name](None) as d:

            def layer(params: dict[str, Tensor], x: Tensor, routing: Routing) -> Tensor:
                how: Any = dict(dispatcher=d, backend="loop", recompute=recompute)
                return fmoe.experts(params, x, routing, CONFIG, **how)

            right = grads(layer, naive.draw(CONFIG), x, routing, r)
            found = grads(torch.compile(layer, backend="aot_eager"), naive.draw(CONFIG), x, routing, r)
            for key, t in found.items():
                torch.testing.assert_close(t, right[key], rtol=1e-12, atol=1e-12)
            with pytest.raises(Exception, match=f"{name} talks to other ranks"):
                torch.compile(layer, backend="aot_eager", fullgraph=True)(naive.draw(CONFIG), x, routing)
    finally:
        torch._dynamo.reset()
        torch.distributed.destroy_process_group()
