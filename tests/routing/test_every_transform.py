"""Functions of losses, routing and surgery x transforms: each gives, under each, the values and gradients of plain."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe import MoEConfig, Routing, losses, routing, surgery

E, K, T, D, I = 4, 2, 6, 5, 3
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, score_func="sigmoid")
HF = dict(model_type="mixtral", num_local_experts=E, num_experts_per_tok=K, hidden_size=D, intermediate_size=I)
IDS = torch.tensor([[0, 1], [3, 2], [1, -1], [2, 0], [3, 1], [0, 3]])
MASK = torch.tensor([True, True, False, True, True, True])


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = ((T, D), (E, D), (E, D, 2 * I), (E, I, D))
    x, gate, up, down = (torch.randn(s, generator=made, dtype=torch.float64) for s in shapes)
    return x, gate, up, down


def block(gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    return {"gate.weight": gate, "experts.gate_and_up_projs": up, "experts.down_projs": down}


def lost(**how: Any) -> Callable[..., Tensor]:
    return lambda x, gate, *_: losses.load_balancing(
        routing.routed({"gate.weight": gate}, x, CONFIG), CONFIG, mask=MASK, **how
    )


def cut(change: Callable[..., Any]) -> Callable[..., Tensor]:
    def f(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        native = {f"layers.0.mlp.{name}": t for name, t in block(gate, up, down).items()}
        made, _ = change(native, HF)
        return sum(t.square().sum() * (1 + i) for i, t in enumerate(made.values()))

    return f


def outside(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    weights = fmoe.route({"gate.weight": gate}, x, CONFIG, indices=IDS).weights
    y, found = fmoe.moe(block(gate, up, down), x, CONFIG, routing=Routing(IDS, weights, MASK), return_routed=True)
    return y.square().sum() + found.scores.sum() + found.counts.sum()


def chosen(x: Tensor, gate: Tensor, *_: Tensor) -> Tensor:
    """By its steps: logits, scores in groups with a bias, a choice, and what losses ask for."""
    groups = replace(CONFIG, n_expert_groups=2, n_limited_groups=1, norm_topk_prob=True)
    logits = routing.gate_logits(x, gate, None, groups)
    alone = routing.topk_routing(logits, groups, gate[:, 1])
    same = routing.routing_of(logits, x.dtype, CONFIG, None, alone.indices, gate[:, 2])
    whole = routing.routed_of(logits, x.dtype, CONFIG, None, IDS, MASK)
    return sum(t.square().sum() for t in (alone.weights, same.weights, whole.scores))


def grown(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    names = ("gate_proj", "up_proj", "down_proj")
    mlp = dict(zip(names, (up[0, :, :I].T, up[0, :, I:].T, down[0].T), strict=True))
    native = {f"model.layers.0.mlp.{n}.weight": t for n, t in mlp.items()}
    dense = dict(model_type="mistral", hidden_size=D, intermediate_size=I, num_attention_heads=1)
    made, _ = surgery.upcycle(native, dense, E, K)
    block = surgery.layers(made)["model.layers.0.mlp"]
    return sum(t.square().sum() for n, t in block.items() if n != "gate.weight")  # which is drawn


def invariant(**how: Any) -> Callable[..., Tensor]:
    def f(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        params = {"gate_and_up_projs": up, "down_projs": down}
        routing = Routing(IDS[:2], x[:2, :K], MASK[1:3])  # each row is a part of the graph
        return fmoe.experts(params, x[:2], routing, CONFIG, batch_invariant=True, **how).square().sum()

    return f


CALLS: dict[str, Callable[..., Tensor]] = {
    "gate_logits, topk_routing, routing_of, routed_of": chosen,
    "layers, upcycle": grown,
    "moe mask": lambda x, *p: fmoe.moe(block(*p), x, CONFIG, mask=MASK).square().sum(),
    "experts batch_invariant": invariant(),
    "experts batch_invariant, recompute, loop": invariant(recompute=True, backend="loop"),
    "load_balancing switch": lost(),
    "load_balancing sequence": lost(kind="sequence"),
    "load_balancing global": lost(kind="global"),
    "router_z": lambda x, gate, *_: losses.router_z(routing.routed({"gate.weight": gate}, x, CONFIG), mask=MASK),
    "attach": lambda x, gate, *_: losses.attach((x * 2).sum() + 0 * gate.sum(), (gate * 3).square().sum(), 1.0),
    "route indices": lambda x, gate, *_: (
        fmoe.route({"gate.weight": gate}, x, CONFIG, indices=IDS).weights.square().sum()
    ),
    "moe indices": lambda x, *p: fmoe.moe(block(*p), x, CONFIG, indices=IDS).square().sum(),
    "moe routing, return_routed": outside,
    "drop": lambda x, gate, *_: routing.drop(routing.route({"gate.weight": gate}, x, CONFIG), 2).weights.square().sum(),
    "count, update_bias": lambda x, gate, *_: (
        gate.square().sum() + routing.update_bias(gate[:, 0], routing.count(Routing(IDS, IDS.double()), E), 0.5).sum()
    ),
    "select": cut(lambda n, c: surgery.select(n, c, [2, 0])),
    "permute": cut(lambda n, c: surgery.permute(n, c, [2, 0, 3, 1])),
    "replicate": cut(lambda n, c: surgery.replicate(n, c, 2)),
    "merge": cut(lambda n, c: surgery.merge(n, c, [[0, 3], [1, 2]], [[0.25, 0.75], [0.5, 0.5]])),
}


def by_backward(f: Callable[..., Tensor], *args: Tensor) -> tuple[Any, ...]:
    leaves = [t.clone().requires_grad_() for t in args]
    f(*leaves).backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def in_batches(f: Callable[..., Tensor], *args: Tensor) -> tuple[Any, ...]:
    leaves = [t.clone().requires_grad_() for t in args]
    how = dict(is_grads_batched=True, allow_unused=True)
    found = torch.autograd.grad(f(*leaves), leaves, torch.tensor([2.0, 1.0], dtype=torch.float64), **how)
    return tuple(torch.zeros_like(t) if g is None else g[1] for g, t in zip(found, leaves, strict=True))


ALL = (0, 1, 2, 3)
HOW: dict[str, Callable[..., tuple[Any, ...]]] = {
    "grad": lambda f, *a: torch.func.grad(f, ALL)(*a),
    "vmap": lambda f, *a: tuple(
        g[1] for g in torch.vmap(torch.func.grad(f, ALL), randomness="same")(*(torch.stack([2 * t, t]) for t in a))
    ),
    "compile of grad": lambda f, *a: torch.compile(torch.func.grad(f, ALL), fullgraph=True, backend="aot_eager")(*a),
    "compile": lambda f, *a: by_backward(torch.compile(f, fullgraph=True, backend="aot_eager"), *a),
    "in batches": in_batches,
    "checkpoint": lambda f, *a: by_backward(lambda *b: checkpoint(f, *b, use_reentrant=False), *a),
}
CELLS = [(name, how) for name in CALLS for how in HOW]


OF_THE_HOST = {"SCORES", "Score", "load", "load_balance_metrics"}
"""What makes no tensor."""


def test_every_public_function_has_a_call() -> None:
    public = {*routing.__all__, *surgery.__all__, "load_balancing", "router_z", "attach"} - OF_THE_HOST
    told = inspect.getsource(inspect.getmodule(drawn))
    assert not [name for name in public if f".{name}(" not in told]


@pytest.mark.parametrize(("name", "how"), CELLS)
def test_gradients_are_those_of_backward(name: str, how: str) -> None:
    args = drawn()
    for found, wanted in zip(HOW[how](CALLS[name], *args), by_backward(CALLS[name], *args), strict=True):
        torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()
