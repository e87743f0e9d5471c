"""A dispatcher's sums: in fp32, rounded once, in the order of one device; and under torch.func and a compiler."""

from dataclasses import replace
from typing import Any

import naive
import pytest
import threads
import torch
from dispatchers import CONFIG, DISPATCHERS, OVER_GROUPS, WAYS, batch, grads, of_rank, share
from hypothesis import given, settings
from routings import Case, cases, everywhere, laws, lone
from torch import Tensor

import fmoe
from fmoe.backends.order import Order
from fmoe.dispatch import Dispatcher
from fmoe.dispatch.local import Plan, combine
from fmoe.dispatch.moves import IN_ORDER, added
from fmoe.types import MoEConfig, Routing


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


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(4, 1, 3), (4, 2, 3), (1, 3, 5), (4, 8, 33), (1, 8, 40), (300, 8, 40), (4, IN_ORDER, 64), (1, 20, 64)]
SHAPES += [(4, k, 1 << 15) for k in (2, 3, 5)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T, k, D", SHAPES)
def test_the_rows_of_a_token_are_added_one_after_the_other_and_rounded_once(
    T: int, k: int, D: int, dtype: torch.dtype
) -> None:
    """However many tokens there are, wherever a row's columns end, and whichever slots of others go nowhere."""
    made = torch.Generator().manual_seed(k)
    rows, row = torch.randn(T * k, D, generator=made).to(dtype), torch.randperm(T * k, generator=made)
    expected = torch.zeros(T, D, dtype=torch.promote_types(dtype, torch.float32))
    for of in row.view(T, k).unbind(1):
        expected += rows[of]
    for to in (None, *FLOATS):
        y = added(rows, row, k, to)
        assert y.dtype == (to or expected.dtype) and torch.equal(y, expected.to(y.dtype))
        if T == 1:
            assert torch.equal(Order(dict.fromkeys(range(k), 1)).added(rows[row], k, y.dtype), y)
    some = combine(rows[row[:-1]], Plan(torch.arange(T * k - 1), torch.tensor([T * k - 1]), T, k))
    assert torch.equal(some[:-1], expected[:-1])


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
def test_func_grad_is_backward(name: str) -> None:
    """torch.func sees through a dispatcher, with and without recomputation; grad of grad, gradients in batches too."""
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

            leaves = [t.clone().requires_grad_() for t in (x, routing.weights)]
            made, batch = loss(params, *leaves), torch.tensor([1.0, 2.0, 0.0]).double()
            found = torch.autograd.grad(made, leaves, batch, is_grads_batched=True)
            for key, t in zip("xw", found, strict=True):
                wanted = torch.stack([c * right[key] for c in batch])
                torch.testing.assert_close(t, wanted, rtol=1e-12, atol=1e-12)
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
@pytest.mark.parametrize("recompute", [False, True])
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
