"""LoRA, frozen weights, what backward keeps, and autocast: for every backend."""

from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import draw, grads_of, near, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmoe.backends import BACKENDS
from fmoe.layer.block import moe
from fmoe.layer.checks import PAIRS
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4)
BIASED = replace(CONFIG, expert_bias=True)
AFTER = replace(BIASED, apply_router_weight_after_down=True)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_weightings = pytest.mark.parametrize("config", [BIASED, AFTER], ids=["between", "after"])


def lora(config: MoEConfig, r: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    E, D, I = config.n_routed_experts, config.expert_dim, config.moe_inter_dim
    U = I if config.expert_activation == "relu2" else 2 * I
    shapes = {
        "lora_gate_and_up_A": (E, D, r),
        "lora_gate_and_up_B": (E, r, U),
        "lora_down_A": (E, I, r),
        "lora_down_B": (E, r, D),
    }
    generator = torch.Generator().manual_seed(r)
    draw = lambda s: 0.4 * torch.randn(s, dtype=torch.float64, generator=generator)
    return {name: draw(shape).to(dtype) for name, shape in shapes.items()}


def merged(params: dict[str, Tensor], x: Tensor, routing: Routing, config: MoEConfig, alpha: float) -> Tensor:
    """The definition: W + alpha / r * A @ B in place of W."""
    whole = {name: p for name, p in params.items() if name not in PAIRS}
    for weight, part in (("gate_and_up_projs", "gate_and_up"), ("down_projs", "down")):
        if f"lora_{part}_A" in params:
            A, B = params[f"lora_{part}_A"], params[f"lora_{part}_B"]
            whole[weight] = whole[weight] + alpha / A.shape[-1] * (A @ B)
    return naive.experts(whole, x, routing, config)


@every_backend
@both_weightings
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(deadline=None, max_examples=6)
@given(
    r=st.sampled_from([1, 2, 3, 8]),
    act=st.sampled_from(["swiglu", "relu2", "quick_geglu"]),
    parts=st.sampled_from([("gate_and_up", "down"), ("down",), ("gate_and_up",)]),
    alpha=st.sampled_from([32.0, 5.0]),
)
def test_lora_is_its_definition(
    r: int, act: str, parts: tuple[str, ...], alpha: float, dtype: torch.dtype, config: MoEConfig, backend: str
) -> None:
    config = replace(config, expert_activation=act)
    adapters = {name: p for name, p in lora(config, r).items() if any(f"lora_{part}_" in name for part in parts)}
    params, (x, routing) = {**draw(config), **adapters}, tokens(config)
    wanted, wanted_grads = grads_of(merged, params, x, routing, config=config, alpha=alpha)
    at = {name: p.to(dtype) for name, p in params.items()}
    routing = routing._replace(weights=routing.weights.to(dtype))
    y, grads = grads_of(experts, at, x.to(dtype), routing, config=config, backend=backend, lora_alpha=alpha)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    near(y, wanted, tolerance)
    assert set(grads) == set(wanted_grads)
    for name in grads:
        near(grads[name], wanted_grads[name], tolerance)


def test_lora_through_the_whole_block() -> None:
    params = {f"experts.{name}": p for name, p in {**draw(CONFIG), **lora(CONFIG, 2)}.items()}
    params["gate.weight"] = torch.randn(5, 6, dtype=torch.float64)
    x, off = tokens(CONFIG)[0], {name: p for name, p in params.items() if "lora" not in name}
    zero = {name: torch.zeros_like(p) if name.endswith("_B") else p for name, p in params.items()}
    near(moe(zero, x, CONFIG), moe(off, x, CONFIG), 1e-14)
    one, two = (moe(params, x, CONFIG, lora_alpha=alpha) for alpha in (2.0, 4.0))
    scaled = {name: 2 * p if name.endswith("_B") else p for name, p in params.items()}
    near(two, moe(scaled, x, CONFIG, lora_alpha=2.0), 1e-14)
    assert not torch.allclose(one, two)


@every_backend
def test_narrow_matrices_beside_wide_tokens_are_scaled_in_the_dtype_of_the_products(backend: str) -> None:
    """32 / 3 is no fp32 number."""
    params, (x, routing) = draw(CONFIG) | lora(CONFIG, 3, torch.float32), tokens(CONFIG)
    run = lambda params: experts(params, x, routing, CONFIG, backend=backend)
    near(run(params), run({n: p.double() for n, p in params.items()}), 1e-14)


def test_lora_matrices_are_checked() -> None:
    params, (x, routing) = {**draw(CONFIG), **lora(CONFIG, 2)}, tokens(CONFIG)
    alone = {name: p for name, p in params.items() if name != "lora_down_B"}
    with pytest.raises(ValueError, match="'lora_down_A' stands alone, expected 'lora_down_B' beside it"):
        experts(alone, x, routing, CONFIG)
    with pytest.raises(ValueError, match=r"'lora_down_B' has shape \[5, 3, 6\], expected \[E=5, r=2, D=6\]"):
        experts({**params, "lora_down_B": torch.ones(5, 3, 6)}, x, routing, CONFIG)


class Shapes(TorchDispatchMode):
    """The shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        return out


@every_backend
@both_weightings
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "trained", [(), ("gate_and_up_projs",), ("down_projs",), ("lora_down_A",), ("down_proj_bias",)]
)
def test_no_gradient_of_a_frozen_weight_is_computed(
    trained: tuple[str, ...], recompute: bool, config: MoEConfig, backend: str
) -> None:
    """Backward makes nothing of the shape of a weight that is frozen, and right gradients of what is not."""
    params, (x, routing) = {**draw(config), **lora(config, 2)}, tokens(config)
    _, wanted = grads_of(experts, params, x, routing, config=config, backend=backend)
    leaves = {name: p.clone().requires_grad_(name in trained) for name, p in params.items()}
    x = x.requires_grad_()
    y = experts(leaves, x, routing, config, backend=backend, recompute=recompute)
    r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).bfloat16()
    loss = (y * r.to(y.dtype)).sum()
    with Shapes() as mode:
        loss.backward()
    near(x.grad, wanted["x"], 1e-12)
    for name in trained:
        near(leaves[name].grad, wanted[name], 1e-12)
    if not recompute:  # which multiplies by weights once more, and casts them
        weights = ("gate_and_up_projs", "down_projs")
        assert {name for name in weights if tuple(params[name].shape) in mode.seen} == set(trained) & set(weights)


@every_backend
@both_weightings
def test_recompute_is_the_same_and_keeps_arguments_alone(config: MoEConfig, backend: str) -> None:
    """Bit for bit; and of what grows with the tokens, x, the routing and its plan are all that is kept."""
    params, (x, routing) = {**draw(config), **lora(config, 2)}, tokens(config, T=40)
    for dtype in (torch.float64, torch.bfloat16):
        at = {name: p.to(dtype) for name, p in params.items()}
        kwargs: dict[str, Any] = dict(config=config, backend=backend)
        y, grads = grads_of(experts, at, x.to(dtype), routing, **kwargs)
        again, again_grads = grads_of(experts, at, x.to(dtype), routing, recompute=True, **kwargs)
        assert torch.equal(y, again) and all(torch.equal(grads[name], again_grads[name]) for name in grads)

    def kept(recompute: bool) -> int:
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        mine = {p.data_ptr() for p in leaves.values()}
        saved: dict[int, int] = {}

        def save(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in mine:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            y = experts(leaves, x.clone().requires_grad_(), routing, config, recompute=recompute, backend=backend)
        y.sum().backward()
        return sum(saved.values())

    T, K = routing.indices.shape
    arguments = x.nbytes + routing.weights.nbytes + 8 * T * K + 8 * config.n_routed_experts
    assert kept(True) <= arguments + T + 64 < kept(False)


@every_backend
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_a_cast_of_what_is_multiplied(cast: torch.dtype, backend: str) -> None:
    """Inside autocast: y in x's dtype, of products in autocast's, bit for bit what casting x gives; fp64 stays."""
    params, (x, routing) = {**draw(BIASED, torch.float32), **lora(BIASED, 2, torch.float32)}, tokens(BIASED)
    x = x.float()
    kwargs: dict[str, Any] = dict(config=BIASED, backend=backend, lora_alpha=2.0)
    by_hand, by_hand_grads = grads_of(experts, params, x.to(cast), routing, **kwargs)
    with torch.autocast("cpu", dtype=cast):
        y, grads = grads_of(experts, params, x, routing, **kwargs)
        double, double_grads = grads_of(experts, params, x.double(), routing, **kwargs)
    assert y.dtype == torch.float32 and torch.equal(y.to(cast), by_hand) and not torch.equal(y, by_hand.float())
    for name in grads:
        assert grads[name].isfinite().all() and torch.equal(grads[name], by_hand_grads[name].to(grads[name].dtype))
    exact, exact_grads = grads_of(experts, params, x.double(), routing, **kwargs)
    assert torch.equal(double, exact) and all(torch.equal(double_grads[n], exact_grads[n]) for n in exact_grads)


@every_backend
def test_autocast_compiles(backend: str) -> None:
    params, (x, routing) = draw(BIASED, torch.float32), tokens(BIASED)

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return experts(params, x, routing, BIASED, backend=backend)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x.float()), f(x.float()))
