"""Router replay, `Routed`, counts and capacities: laws over every score function, and formulas in plain python."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe import MoEConfig, Routed, Routing
from fmoe.routing import SCORES, count, drop, load, update_bias
from fmoe.types import INTEGERS

E, K, D, T = 8, 3, 6, 11
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=4, dtype=torch.float64)
WAYS: dict[str, dict[str, Any]] = {name: dict(score_func=name) for name in SCORES} | {
    "before top-k": dict(softmax_before_topk=True),
    "groups": dict(score_func="sigmoid", n_expert_groups=4, n_limited_groups=2, force_e_score_correction_bias=True),
    "weights of biased scores": dict(score_func="sigmoid_with_bias", router_weight_uses_score_correction_bias=True),
}
every_way = pytest.mark.parametrize("way", WAYS)
either_norm = pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])


def made(way: str, norm: bool = True, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, MoEConfig]:
    config = replace(CONFIG, route_scale=1.5, norm_topk_prob=norm, **WAYS[way])
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"gate.weight": (E, D)} | ({} if config.score_func == "softmax" else {"gate.bias": (E,)})
    if SCORES[config.score_func].bias == "needed" or config.force_e_score_correction_bias:
        shapes |= {"gate.e_score_correction_bias": (E,)}
    params = {n: 0.5 * torch.randn(s, generator=drawn, dtype=torch.float64) for n, s in shapes.items()}
    params |= {f"experts.{n}": p for n, p in naive.draw(config).items()}
    return params, torch.randn(T, D, generator=drawn, dtype=torch.float64), config


@every_way
@either_norm
@settings(max_examples=3)
@given(seed=st.integers(0, 99))
def test_replaying_a_routing_gives_its_weights_y_and_gradients(way: str, norm: bool, seed: int) -> None:
    params, x, config = made(way, norm, seed)
    first = fmoe.route(params, x, config)
    again = fmoe.route(params, x, config, indices=first.indices.int())
    assert torch.equal(again.indices, first.indices) and torch.equal(again.weights, first.weights)
    grads = lambda **how: torch.func.grad(lambda p, x: fmoe.moe(p, x, config, **how).square().sum(), (0, 1))(params, x)
    assert torch.equal(fmoe.moe(params, x, config, indices=first.indices), fmoe.moe(params, x, config))
    own, replayed = grads(), grads(indices=first.indices)
    for name in params:
        torch.testing.assert_close(replayed[0][name], own[0][name])
    torch.testing.assert_close(replayed[1], own[1])


@every_way
@either_norm
def test_a_dropped_slot_weighs_nothing_and_takes_no_part(way: str, norm: bool) -> None:
    """Two live slots beside a dropped one weigh as a router of two would have them; dropped slots alone give 0."""
    params, x, config = made(way, norm)
    indices = fmoe.route(params, x, config).indices
    holes = indices.clone()
    holes[:, 1], holes[3], holes[4, 0] = -1, -1, E + 5
    found = fmoe.route(params, x, config, indices=holes.to(torch.int16))
    two = fmoe.route(params, x, replace(config, n_activated_experts=2), indices=indices[:, [0, 2]])
    live = [t for t in range(T) if t not in (3, 4)]
    torch.testing.assert_close(found.weights[live][:, [0, 2]], two.weights[live])
    assert not found.weights[:, 1].any() and not found.weights[3].any() and found.weights[4, 0] == 0
    grads = torch.func.grad(lambda p: fmoe.route(p, x, config, indices=holes).weights.square().sum())(params)
    assert all(g.isfinite().all() for g in grads.values())
    y = fmoe.moe(params, x, config, indices=holes)
    assert y.isfinite().all() and not y[3].any()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_indices_of_any_integer_dtype(dtype: torch.dtype) -> None:
    params, x, config = made("sigmoid")
    first = fmoe.route(params, x, config)
    assert torch.equal(fmoe.route(params, x, config, indices=first.indices.to(dtype)).weights, first.weights)


@every_way
def test_routed_says_what_the_routing_was_made_of(way: str) -> None:
    params, x, config = made(way)
    mask = torch.arange(T) % 3 > 0
    y, routed = fmoe.moe(params, x, config, mask=mask, return_routed=True)
    assert isinstance(routed, Routed) and torch.equal(y, fmoe.moe(params, x, config, mask=mask))
    logits = x.masked_fill(~mask[:, None], 0) @ params["gate.weight"].T + params.get(
        "gate.bias", torch.zeros(E).double()
    )
    torch.testing.assert_close(routed.logits, logits)
    plain = way in ("softmax", "sigmoid_of_best_logits", "sparsemixer")
    scores = {
        "soft": logits.softmax(-1), "sigm": logits.sigmoid(), "sqrt": torch.nn.functional.softplus(logits).sqrt()
    }  # fmt: skip
    torch.testing.assert_close(routed.scores, logits if plain else scores[(config.score_func)[:4]])
    own = fmoe.route(params, x, config, mask=mask)
    assert torch.equal(routed.routing.indices, own.indices) and torch.equal(routed.routing.weights, own.weights)
    assert routed.counts.dtype == torch.int64 and routed.counts.sum() == K * mask.sum()
    assert torch.equal(routed.counts, own.indices[mask].flatten().bincount(minlength=E))
    for part in ("logits", "scores"):
        pull = lambda p, part=part: getattr(fmoe.moe(p, x, config, return_routed=True)[1], part).square().sum()
        assert torch.func.grad(pull)(params)["gate.weight"].any()


def test_a_whole_routing_from_outside_needs_no_gate() -> None:
    params, x, config = made("sigmoid")
    routing = fmoe.route(params, x, config)
    bare = {n: p for n, p in params.items() if not n.startswith("gate.")}
    assert torch.equal(fmoe.moe(bare, x, config, routing=routing), fmoe.moe(params, x, config))
    mask = torch.arange(T) % 2 == 0
    both = fmoe.moe(bare, x, config, routing=routing._replace(mask=mask), mask=torch.arange(T) > 4)
    assert both.any(1).tolist() == (mask & (torch.arange(T) > 4)).tolist()
    swapped = routing._replace(indices=(routing.indices + 1) % E)
    y, routed = fmoe.moe(params, x, config, routing=swapped, return_routed=True)
    assert torch.equal(routed.counts, count(swapped, E)) and torch.equal(routed.routing.weights, routing.weights)
    assert torch.equal(y, fmoe.moe(bare, x, config, routing=swapped))
    shaped = fmoe.moe(params, x[:10].view(2, 5, D), config, indices=routing.indices[:10].view(2, 5, K))
    assert torch.equal(shaped.view(10, D), fmoe.moe(params, x[:10], config))


def test_errors() -> None:
    params, x, config = made("sigmoid")
    routing = fmoe.route(params, x, config)
    with pytest.raises(ValueError, match="a routing and indices are given"):
        fmoe.moe(params, x, config, routing=routing, indices=routing.indices)
    for indices in (routing.indices[:-1], routing.indices[:, :2], routing.indices.double()):
        with pytest.raises(ValueError, match=r"indices are .*expected integer \[T=11, K=3\]"):
            fmoe.route(params, x, config, indices=indices)
    with pytest.raises(ValueError, match="'indices' is on meta"):
        fmoe.route(params, x, config, indices=routing.indices.to("meta"))
    with pytest.raises(ValueError, match="mask is torch.int64"):
        fmoe.route(params, x, config, mask=torch.ones(T, dtype=torch.int64))
    with pytest.raises(ValueError, match="by='size'"):
        drop(routing, 2, by="size")
    with pytest.raises(ValueError, match="capacity=-1"):
        drop(routing, -1)
    with pytest.raises(ValueError, match=r"bias is \[4\], counts are torch.float32 \[3\]"):
        update_bias(torch.zeros(4), torch.ones(3), 0.1)


def test_a_frozen_gate_gets_no_gradient_and_x_does() -> None:
    params, x, config = made("softmax")
    frozen = replace(config, train_gate=False)
    pull = lambda c: torch.func.grad(lambda p, x: fmoe.moe(p, x, c).square().sum(), (0, 1))(params, x)
    (free, dx), (held, dx2) = pull(config), pull(frozen)
    assert free["gate.weight"].any() and not held["gate.weight"].any()
    torch.testing.assert_close(dx, dx2)


routings = st.integers(0, 9999).map(
    lambda seed: Routing(
        torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(seed)),
        torch.randint(0, 5, (T, K), generator=torch.Generator().manual_seed(seed + 1)) / 4,  # with ties
        torch.rand(T, generator=torch.Generator().manual_seed(seed + 2)) < 0.8,
    )
)


@given(routing=routings, capacity=st.integers(0, 6), by=st.sampled_from(["weight", "position"]))
def test_drop_keeps_of_each_expert_what_it_says(routing: Routing, capacity: int, by: str) -> None:
    found = drop(routing, capacity, by)
    slots = [(t, k) for t in range(T) for k in range(K) if routing.mask[t] and routing.indices[t, k] >= 0]  # type: ignore[index]
    if by == "weight":
        slots.sort(key=lambda s: -float(routing.weights[s]))  # stable: of equal ones the first
    room, kept = [capacity] * E, set()
    for s in slots:
        e = int(routing.indices[s])
        if room[e]:
            room[e] -= 1
            kept.add(s)
    for t in range(T):
        for k in range(K):
            gone = routing.mask[t] and routing.indices[t, k] >= 0 and (t, k) not in kept  # type: ignore[index]
            assert found.indices[t, k] == (-1 if gone else routing.indices[t, k])
            assert found.weights[t, k] == (0 if gone else routing.weights[t, k])
    assert count(found, E).max() <= capacity and count(found, E).sum() == len(kept)


@given(routing=routings)
def test_counts_sum_to_routed_slots(routing: Routing) -> None:
    routed = ((routing.indices >= 0) & routing.mask[:, None]).sum()  # type: ignore[index]
    assert count(routing, E).sum() == routed
    assert count(drop(routing, T * K), E).tolist() == count(routing, E).tolist()


def test_load_and_update_bias() -> None:
    told = load(torch.tensor([6, 2, 0, 0]))
    assert told["max_over_mean"] == 3 and told["idle_experts"] == 2
    assert told["entropy"] == pytest.approx(-(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()).item())
    assert load(torch.zeros(3, dtype=torch.int64)) == {"max_over_mean": 0.0, "entropy": 0.0, "idle_experts": 3}
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    new = update_bias(bias, torch.tensor([6, 2, 0, 0]), 0.1)
    torch.testing.assert_close(new, torch.tensor([0.4, 0.5, 0.6, 0.6]))
    assert bias.eq(0.5).all()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "eager": lambda f, *a: f(*a),
    "compiled": lambda f, *a: torch.compile(f, fullgraph=True, backend="aot_eager")(*a),
    "vmap": lambda f, *a: tuple(t[1] for t in torch.vmap(f)(*(torch.stack([2 * t, t]) for t in a))),
    "checkpoint": lambda f, *a: checkpoint(f, *a, use_reentrant=False),
}


@pytest.mark.parametrize("how", TRANSFORMS)
def test_under_every_transform(how: str) -> None:
    params, x, config = made("sigmoid")
    gate = params["gate.weight"]

    def f(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        held = {n: p for n, p in params.items() if n != "gate.bias"} | {"gate.weight": weight}
        indices = (fmoe.route(held, x, config).indices + 1) % E
        y, routed = fmoe.moe(held, x, config, indices=indices, return_routed=True)
        cut = drop(routed.routing, 2)
        return y, routed.scores, routed.counts, fmoe.moe(held, x, config, routing=cut)

    for found, wanted in zip(TRANSFORMS[how](f, gate, x), f(gate, x), strict=True):
        torch.testing.assert_close(found, wanted)
    total = lambda w, x: f(w, x)[0].square().sum() + f(w, x)[3].sum()
    grad = torch.func.grad(total)
    if how == "compiled":
        torch.testing.assert_close(torch.compile(grad, fullgraph=True, backend="aot_eager")(gate, x), grad(gate, x))
    leaf = gate.clone().requires_grad_()
    out = TRANSFORMS[how](f, leaf, x)
    (out[0].square().sum() + out[3].sum()).backward()
    torch.testing.assert_close(leaf.grad, grad(gate, x))
    torch._dynamo.reset()
