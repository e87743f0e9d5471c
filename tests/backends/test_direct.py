"""The short ways of a CPU: products of few rows, and a layer that nobody listens to, bit for bit what others hear."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import draw, near, tokens
from torch import Tensor

from fmoe.activations import ACTIVATIONS
from fmoe.backends import direct as short
from fmoe.backends import order
from fmoe.backends.raw import loop
from fmoe.dispatch import moves
from fmoe.layer import experts as layer
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=16, moe_inter_dim=8, expert_bias=True)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BARE = dict(expert_bias=False)
MODES = {"plain": {}, "after": dict(apply_router_weight_after_down=True), "unaligned": dict(dim=6, moe_inter_dim=3)}


def of_the_long_way(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as m:
        m.setattr(layer, "direct", lambda *args: None)
        return run()


@pytest.mark.parametrize("mode", [*MODES.values(), BARE, dict(n_routed_experts=40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_nobody_listens_to_has_the_same_bits(
    dtype: torch.dtype, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = replace(CONFIG, **mode), list[object]()
    run = layer.direct
    monkeypatch.setattr(layer, "direct", lambda *args: calls.append(y := run(*args)) or y)
    for large in (1, loop.LARGE):
        monkeypatch.setattr(loop, "LARGE", large)
        for T in (1, 16):
            for turned in (False, True):
                params = {n: p.mT.contiguous().mT if turned else p for n, p in draw(config, dtype).items()}
                x, routing = tokens(config, T=T, dtype=dtype)
                ids = torch.tensor([[3, 0, 2]]) if turned and T == 1 else routing.indices  # neither in their order
                for weighing in {dtype, torch.float32}:
                    routing = Routing(ids % config.n_routed_experts, routing.weights.to(weighing))
                    with torch.no_grad():
                        alone = experts(params, x, routing, config)
                        assert calls.pop() is not None and not calls
                        other = of_the_long_way(monkeypatch, partial(experts, params, x, routing, config))
                    assert torch.equal(alone, other) and not calls


@pytest.mark.parametrize("stored", [False, True])
def test_a_token_alone_is_multiplied_without_a_copy(stored: bool) -> None:
    config = replace(CONFIG, n_routed_experts=40, expert_bias=False)
    params = draw(config, torch.float32)
    params = {name: p.mT.contiguous().mT if stored else p for name, p in params.items()}
    routing = Routing(torch.tensor([[7, 0, 39]]), torch.ones(1, 3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        experts(params, torch.ones(1, config.dim), routing, config)
    steps = {event.key for event in seen.key_averages()}
    assert "aten::mm" in steps and not steps & {"aten::clone", "aten::copy_", "aten::_to_copy"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [dict(dim=64, moe_inter_dim=64), dict(dim=6, moe_inter_dim=3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_have_the_same_bits_and_so_have_their_own(
    turned: bool, dtype: torch.dtype, sizes: dict[str, int], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, **BARE, **sizes, expert_activation=activation)
    monkeypatch.setattr(order, "PART", 4)  # several parts

    def same(T: int, K: int, weighing: torch.dtype) -> None:
        drawn = draw(config, dtype)
        x, routing = tokens(config, T=T, dtype=dtype)
        given = [x, routing.weights[:, :K].to(weighing)]
        given += [p.mT.contiguous().mT if turned else p for p in drawn.values()]
        given = [t.detach().requires_grad_() for t in given]
        ids = routing.indices[:, :K] % (config.n_routed_experts - 1)  # the last expert is idle
        ids = torch.tensor([[3, 0, 2]]) if turned and T == 1 else ids

        def first(create_graph: bool = False) -> list[Tensor]:
            y = experts(dict(zip(drawn, given[2:], strict=True)), given[0], Routing(ids, given[1]), config)
            return [y, *torch.autograd.grad((y / 512).square().sum(), given, create_graph=create_graph)]

        def second() -> list[Tensor]:
            return list(torch.autograd.grad(sum(g.square().sum() for g in first(create_graph=True)), given))

        for one, other in zip(first(), of_the_long_way(monkeypatch, first), strict=True):
            assert torch.equal(one, other)
        if weighing == torch.float64:  # added up in another order
            for one, other in zip(second(), of_the_long_way(monkeypatch, second), strict=True):
                near(one, other, 1e-13)

    for large, T, K in ((1, 1, 3), (1, 9, 1), (1, 9, 3), (loop.LARGE, 9, 3)):
        monkeypatch.setattr(loop, "LARGE", large)
        monkeypatch.setattr(moves, "PART", 2 * K * config.dim)
        same(T, K, dtype)
        same(T, K, torch.float32)


def test_indices_that_are_filled_anew_before_backward_change_no_derivative() -> None:
    config = replace(CONFIG, **BARE)
    x, routing = tokens(config, T=5)
    ids, params = routing.indices % config.n_routed_experts, draw(config)

    def second(ids: Tensor, change: bool) -> Tensor:
        mine = x.detach().requires_grad_()
        y = experts(params, mine, Routing(ids, routing.weights), config)
        if change:
            ids.zero_()
        (first,) = torch.autograd.grad(y.square().sum(), mine, create_graph=True)
        return torch.autograd.grad(first.square().sum(), mine)[0]

    assert torch.equal(second(ids.clone(), True), second(ids, False))


def test_a_gradient_that_will_be_differentiated_is_that_of_its_own_place() -> None:
    """Also where weights are made of x, down of up, and one tensor stands in two places."""
    config = replace(CONFIG, **BARE, dim=4, moe_inter_dim=4, expert_activation="relu2")
    x, routing = tokens(config, T=2)
    ids, drawn = routing.indices % config.n_routed_experts, draw(config)
    leaves = [t.detach().requires_grad_() for t in (x, drawn["gate_and_up_projs"])]
    y = lambda x, up, down: experts(
        dict(zip(short.NAMES, (up, down), strict=True)), x, Routing(ids, x[:, :3].exp()), config
    )
    for down in (torch.sin, lambda up: up, lambda up: up.mT):
        f = lambda x, up, down=down: y(x, up, down(up)).square().sum()
        plain = torch.autograd.grad(f(*leaves), leaves)
        for one, other in zip(torch.autograd.grad(f(*leaves), leaves, create_graph=True), plain, strict=True):
            near(one, other, 1e-13)
        assert torch.autograd.gradgradcheck(lambda x, f=f: f(x, leaves[1].detach()), leaves[:1], fast_mode=True)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_no_gradient_is_computed_that_nobody_needs(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, **BARE)
    x, routing = tokens(config, T=5)
    given = [x, routing.weights, *draw(config).values()]
    given = [t.detach().requires_grad_(bool(wanted >> n & 1)) for n, t in enumerate(given)]
    params = dict(zip(short.NAMES, given[2:], strict=True))

    def run() -> list[Tensor | None]:
        ids = routing.indices % config.n_routed_experts
        experts(params, given[0], Routing(ids, given[1]), config).square().sum().backward()
        return [(t.grad, setattr(t, "grad", None))[0] for t in given]

    for one, other, t in zip(run(), of_the_long_way(monkeypatch, run), given, strict=True):
        assert (one is None) is (other is None) is not t.requires_grad
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("why", ["mask", "dropped", "no token"])
def test_what_goes_nowhere_takes_the_long_way(why: str) -> None:
    params, (x, routing) = draw(CONFIG), tokens(CONFIG, T=4)
    routing = routing._replace(indices=routing.indices % CONFIG.n_routed_experts, mask=None)
    whole = experts(params, x, routing, CONFIG)
    if why == "no token":
        assert experts(params, x[:0], type(routing)(*(t[:0] for t in routing[:2])), CONFIG).shape == (0, 16)
        return
    indices = routing.indices.clone()
    indices[1] = -1 if why == "dropped" else indices[1]
    mask = torch.arange(4) != 1 if why == "mask" else None
    y = experts(params, x, routing._replace(indices=indices, mask=mask), CONFIG)
    assert not y[1].any() and torch.allclose(y[[0, 2, 3]], whole[[0, 2, 3]], rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["this", "16 bits in fp32", (False, range(0)), (True, range(2, 9)), (False, range(8, 49))]
)
def test_products_of_few_rows_by_large_matrices(kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU of each kind, whichever this one is."""
    monkeypatch.setattr(loop, "LARGE", 1)
    if kind != "this":
        turned = (False, range(0)) if isinstance(kind, str) else kind
        monkeypatch.setattr(loop, "widens", lambda x: isinstance(kind, str) and x.dtype.itemsize == 2)
        monkeypatch.setattr(loop, "_turned", lambda x, w: turned if w.stride(1) == 1 else (False, range(0)))
    rounding = {8: 1e-14, 4: 1e-6, 2: 8e-3}[dtype.itemsize]
    for n in (*range(1, 18), loop.FEW, loop.FEW + 1):
        made = torch.Generator().manual_seed(n)
        new = lambda *shape, made=made: torch.randn(shape, generator=made).to(dtype)
        x, y, w, offsets = new(n + 3, 16), new(n + 3, 24), new(3, 16, 24), torch.tensor([1, 1, n + 1]).int()
        for weights in (w, w.mT.contiguous().mT):
            out = loop.gmm(x, weights, offsets)[: n + 1]
            near(out, torch.cat([x[:1].double() @ w[0].double(), x[1 : n + 1].double() @ w[2].double()]), rounding)
        dw = loop.tgmm(x, y, offsets)
        near(dw[2], x[1 : n + 1].double().mT @ y[1 : n + 1].double(), rounding)
        near(dw[0], x[:1].double().mT @ y[:1].double(), rounding)
        assert not dw[1].any()


@pytest.mark.parametrize("few", [0, 512])
@settings(deadline=None, max_examples=60)
@given(drawn=st.data())
def test_slots_are_sorted_by_expert_however_many_they_are(few: int, drawn: st.DataObject) -> None:
    E, T, K = drawn.draw(st.tuples(st.sampled_from([1, 3, 255, 256, 70_000]), st.integers(0, 5), st.integers(1, 4)))
    ids = drawn.draw(st.lists(st.integers(-1, E) | st.integers(0, min(E, 4) - 1), min_size=T * K, max_size=T * K))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "FEW", few)
        found = order.ordered(torch.tensor(ids, dtype=torch.int64).view(T, K), E, sort=True)
    if not ids or min(ids) < 0 or max(ids) >= E:
        assert found is None
        return
    slots = sorted(range(T * K), key=ids.__getitem__)
    assert found is not None and [*found.sizes.items()] == [(e, ids.count(e)) for e in sorted({*ids})]
    assert [t.tolist() for t in found[1:]] == [slots, [s // K for s in slots], np.argsort(slots).tolist()]
