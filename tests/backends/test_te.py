"""The backend `te`. L0: logic. L1: against a strict simulator on a CPU. L2: calls bind to published signatures.

L3, on one GPU with Transformer Engine itself, has not been run: it is `gpu_te.py`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import kept
import naive
import pytest
import torch
from simulate_te import World, installed, recipe
from te_cases import AFTER, CONFIG, inputs, same, taken
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fmoe import MoEConfig, Routing, experts
from fmoe.backends import te

LAYERS = {
    "default": CONFIG,
    "weight after down": AFTER,
    "no bias": replace(CONFIG, expert_bias=False),
    "no bias, weight after down": replace(AFTER, expert_bias=False),
    "gpt-oss": replace(CONFIG, expert_activation="quick_geglu"),
    "relu2": replace(CONFIG, expert_activation="relu2"),
}
each_layer = pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)


@pytest.fixture
def world() -> Iterator[World]:
    with installed() as world:
        yield world


@pytest.mark.parametrize(
    "layer, other, lora",
    [*((layer, "loop", lora) for layer in LAYERS for lora in (False, True)), ("default", "triton", False)]
    + [("weight after down", "triton", True), ("gpt-oss", "triton", False), ("gpt-oss", "torch_mm", True)],
)
def test_L1_swapping_the_backend_changes_one_argument(layer: str, other: str, lora: bool, world: World) -> None:
    """In fp32, y and every gradient are within rounding of each other's: 2e-6 of their norm."""
    config = LAYERS[layer]
    same(taken(config, "te", lora), taken(config, other, lora), 2e-6)
    assert len(world.named("GroupedLinear.forward")) == 2


@each_layer
def test_L1_it_is_the_formula(config: MoEConfig, world: World) -> None:
    params, x, routing = inputs(config)
    y, grads = naive.grads_of(naive.experts, params, x, routing, config=config)
    same(taken(config, "te"), {"y": y, **grads}, 2e-6)


def nobody(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    return x, routing._replace(mask=torch.zeros(len(x), dtype=torch.bool))


def last_alone(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """Expert 0 has no rows, and it is its weight that decides whether any gradient of a weight is computed."""
    return x, routing._replace(indices=torch.full_like(routing.indices, 4))


def nothing(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    return x[:0], Routing(*(t[:0] for t in routing))


@pytest.mark.parametrize("change", [nobody, last_alone, nothing])
@pytest.mark.parametrize("kind", [None, "Float8CurrentScaling"])
def test_L1_experts_without_rows_have_zero_gradients(change: Any, kind: str | None, world: World) -> None:
    low = kind and recipe(world, kind)
    found = taken(CONFIG, partial(te.te, recipe=low), change=change)
    same(found, taken(CONFIG, "loop", change=change), 0.1 if low and change is last_alone else 2e-6)
    idle = slice(0, 4) if change is last_alone else slice(None)
    assert all(not found[name][idle].any() for name in naive.draw(CONFIG))
    assert bool(world.named("GroupedLinear.forward")) == (change is last_alone)


@pytest.mark.parametrize(
    "trained", [("x",), ("down_projs",), ("gate_and_up_projs", "weights"), ("down_proj_bias",), ()]
)
def test_L1_only_what_is_needed_is_differentiated(trained: tuple[str, ...], world: World) -> None:
    params, x, routing = inputs()
    right = taken(CONFIG, "loop")
    leaves = {**params, "x": x, "weights": routing.weights}
    for name in trained:
        leaves[name] = leaves[name].clone().requires_grad_()
    y = experts(
        {n: leaves[n] for n in params}, leaves["x"], routing._replace(weights=leaves["weights"]), CONFIG, backend="te"
    )
    assert y.requires_grad == bool(trained)
    if trained:
        r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).bfloat16()
        for name, grad in zip(
            trained, torch.autograd.grad((y * r.to(y)).sum(), [leaves[n] for n in trained]), strict=True
        ):
            naive.near(grad, right[name], 2e-6)
    for weights in (call["weights"] for call in world.named("GroupedLinear.forward")):
        assert len({w.requires_grad for w in weights}) == 1


@each_layer
@pytest.mark.parametrize("kind", [None, "Float8CurrentScaling"])
def test_L1_recomputation_checkpoints_and_torch_func(config: MoEConfig, kind: str | None, world: World) -> None:
    """All of them have the recipe of the forward, whose autocast is over when backward begins."""
    on = recipe(world, kind) if kind else None
    params, x, routing = inputs(config)
    r = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    at_once = partial(te.te, recipe=on)

    def layer(params: Any, x: Tensor, w: Tensor, **how: Any) -> Tensor:
        return experts(params, x, routing._replace(weights=w), config, **{"backend": at_once, **how})

    def grads(f: Any) -> list[Tensor]:
        leaves = {n: p.clone().requires_grad_() for n, p in (params | {"x": x, "w": routing.weights}).items()}
        y = f({n: leaves[n] for n in params}, leaves["x"], leaves["w"])
        world.recipe = None
        (y * r).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    def recomputed(p: Any, x: Tensor, w: Tensor) -> Tensor:
        world.recipe = on  # as within autocast: what find() sees
        return layer(p, x, w, recompute=True, backend="te")

    right = grads(layer)
    assert [c["recipe"] for c in world.named("GroupedLinear.forward")] == [on] * 2
    forms = [recomputed, lambda p, x, w: layer(p, x, w, recompute=True)]
    forms += [
        lambda p, x, w, again=again: checkpoint(
            lambda x, w, *v: layer(dict(zip(p, v, strict=True)), x, w), x, w, *p.values(), use_reentrant=again
        )
        for again in (False, True)
    ]
    for form in forms:
        for found, value in zip(grads(form), right, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    of_func = torch.func.grad(lambda p, x, w: (layer(p, x, w) * r).sum(), (0, 1, 2))(params, x, routing.weights)
    for found, value in zip([*of_func[0].values(), *of_func[1:]], right[1:], strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    assert {c["recipe"] for c in world.named("GroupedLinear.forward")} == {on}


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, where a graph ends
def test_L1_a_compiler_leaves_the_graph(world: World) -> None:
    params, x, routing = inputs()
    layer = lambda x: experts(params, x, routing, CONFIG, backend=te.te)
    try:
        naive.near(torch.compile(layer, backend="aot_eager")(x), layer(x), 2e-6)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Transformer Engine is not traced"):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    finally:
        torch._dynamo.reset()


def test_L1_second_derivatives_and_second_backwards_are_refused(world: World) -> None:
    params, x, routing = inputs()
    f = lambda x: experts(params, x, routing, CONFIG, backend="te").square().sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x)
    y, vjp = torch.func.vjp(f, x)
    vjp(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="backward a second time"):
        vjp(torch.ones_like(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_L1_half_precision(dtype: torch.dtype, world: World) -> None:
    params, x, routing = inputs(dtype=dtype)
    right = experts(params, x, routing, CONFIG, backend="loop")
    found = experts(params, x, routing, CONFIG, backend="te")
    assert found.dtype == dtype
    naive.near(found, right, {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype])


def test_l1_experts_in_codes_are_decoded_for_it_one_at_a_time(world: World) -> None:
    codes, decoded, config = kept.layer("nvfp4")
    x, routing = kept.tokens(config)
    for more in ({}, kept.lora(config)):
        found = kept.results(codes | more, x, routing, config, backend="te")
        expected = kept.results(decoded | more, x, routing, config, backend="te")
        near = kept.results(decoded | more, x, routing, config, backend="loop")
        assert all(torch.equal(t, found[n]) for n, t in expected.items())
        assert all((t - near[n]).norm() <= 1e-5 * near[n].norm() for n, t in expected.items())
