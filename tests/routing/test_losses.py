"""Losses of a router: Transformers' own function, formulas in plain python, two processes, every transform."""

from dataclasses import replace
from typing import Any

import naive
import pytest
import threads
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import fmoe
from fmoe import MoEConfig, Routed
from fmoe.losses import attach, load_balancing, router_z

E, K, D, B, S = 6, 2, 5, 3, 4
T = B * S
CONFIG = MoEConfig(
    n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=4, softmax_before_topk=True, dtype=torch.float64
)
SIGMOID = replace(CONFIG, score_func="sigmoid", softmax_before_topk=False)


def made(config: MoEConfig = CONFIG) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    params = {"gate.weight": torch.randn(E, D, generator=drawn, dtype=torch.float64)}
    params |= {f"experts.{n}": p for n, p in naive.draw(config).items()}
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    return params, torch.randn(T, D, generator=drawn, dtype=torch.float64), mask


def routed(params: dict[str, Tensor], x: Tensor, config: MoEConfig = CONFIG, **how: Any) -> Routed:
    return fmoe.moe(params, x, config, return_routed=True, **how)[1]


@pytest.mark.parametrize("masked", [False, True])
def test_switch_is_that_of_transformers(masked: bool) -> None:
    params, x, mask = made()
    given = mask if masked else None
    theirs = lambda gate: load_balancing_loss_func(((x @ gate.T),), E, K, None if given is None else given.long())
    ours = lambda gate: load_balancing(routed({**params, "gate.weight": gate}, x), CONFIG, mask=given)
    gate = params["gate.weight"]
    close = lambda a, b: torch.testing.assert_close(a.float(), b.float())  # theirs is fp32
    close(ours(gate), theirs(gate))
    close(torch.func.grad(ours)(gate), torch.func.grad(theirs)(gate))
    if masked:  # a mask of the layer is one of the loss
        inside = load_balancing(routed(params, x, mask=mask.flatten()), CONFIG)
        close(inside, theirs(gate))


def test_sequence_is_the_formula_of_deepseek_v3() -> None:
    params, x, mask = made(SIGMOID)

    def formula(gate: Tensor) -> Tensor:
        scores, total = (x @ gate.T).sigmoid().view(B, S, E), torch.zeros((), dtype=torch.float64)
        for b in range(B):
            rows = scores[b][mask[b]]
            top = rows.topk(K, -1).indices
            for e in range(E):
                f = E / (K * len(rows)) * (top == e).sum()
                total = total + f * (rows[:, e] / rows.sum(-1)).mean()
        return total / B

    ours = lambda gate: load_balancing(
        routed({**params, "gate.weight": gate}, x, SIGMOID), SIGMOID, mask=mask, kind="sequence"
    )
    gate = params["gate.weight"]
    torch.testing.assert_close(ours(gate), formula(gate))
    torch.testing.assert_close(torch.func.grad(ours)(gate), torch.func.grad(formula)(gate))
    short = torch.cat([mask, torch.zeros(1, S, dtype=torch.bool)])  # a row of padding alone changes nothing
    more = routed(params, torch.cat([x, x[:S]]), SIGMOID)
    torch.testing.assert_close(load_balancing(more, SIGMOID, mask=short, kind="sequence"), formula(gate))


def test_router_z_is_its_formula_and_padding_takes_no_part() -> None:
    params, x, mask = made()
    logits = x @ params["gate.weight"].T
    torch.testing.assert_close(router_z(routed(params, x)), logits.exp().sum(-1).log().square().mean())
    found = router_z(routed(params, x), mask=mask)
    torch.testing.assert_close(found, logits[mask.flatten()].exp().sum(-1).log().square().mean())


@pytest.mark.parametrize("kind", ["switch", "sequence", "global"])
def test_padding_and_dropped_slots(kind: str) -> None:
    """NaN in padding reaches neither value nor gradient; nothing left is 0; dropped slots are no load."""
    params, x, mask = made(SIGMOID)
    poisoned = x.masked_fill(~mask.flatten()[:, None], torch.nan)
    pull = lambda p, x: load_balancing(routed(p, x, SIGMOID), SIGMOID, mask=mask, kind=kind)
    torch.testing.assert_close(
        pull(params, x), load_balancing(routed(params, poisoned, SIGMOID), SIGMOID, mask=mask, kind=kind)
    )
    nobody = torch.zeros(B, S, dtype=torch.bool)
    assert load_balancing(routed(params, x, SIGMOID), SIGMOID, mask=nobody, kind=kind) == 0
    one = routed(params, x, SIGMOID)
    gone = one.routing.indices.clone()
    gone[:, 1] = -1
    half = routed(params, x, SIGMOID, indices=gone)
    first = load_balancing(half, replace(SIGMOID, n_activated_experts=1), kind=kind)
    alone = one._replace(routing=one.routing._replace(indices=gone[:, :1], weights=one.routing.weights[:, :1]))
    torch.testing.assert_close(load_balancing(alone, replace(SIGMOID, n_activated_experts=1), kind=kind), first)


def test_errors() -> None:
    found = routed(*made()[:2])
    with pytest.raises(ValueError, match="kind is 'even', expected one of switch, sequence, global"):
        load_balancing(found, CONFIG, kind="even")
    with pytest.raises(ValueError, match=r"mask has shape \[5\]"):
        load_balancing(found, CONFIG, mask=torch.ones(5).bool())


@pytest.mark.parametrize("kind", ["global", "sequence"])
def test_gradients_of_all_ranks_sum_to_those_of_one_process(kind: str) -> None:
    params, x, mask = made()
    rows = [slice(0, 1), slice(1, 3)]

    def one(gate: Tensor) -> Tensor:
        whole = routed({**params, "gate.weight": gate}, x)
        return load_balancing(whole, CONFIG, mask=mask, kind="switch" if kind == "global" else kind)

    def law() -> tuple[Tensor, Tensor, Tensor]:
        mine = rows[dist.get_rank()]
        gate = params["gate.weight"].clone().requires_grad_()
        part = routed({**params, "gate.weight": gate}, x.view(B, S, D)[mine].reshape(-1, D))
        loss = load_balancing(part, CONFIG, mask=mask[mine], kind=kind, group=dist.group.WORLD)
        loss.backward()
        counts = fmoe.routing.count(part.routing, E, dist.group.WORLD)
        with pytest.raises(ValueError, match="use kind='global'"):
            load_balancing(part, CONFIG, group=dist.group.WORLD)
        return loss.detach(), gate.grad, counts  # type: ignore[return-value]

    found = threads.run(law, 2)
    gate = params["gate.weight"]
    for loss, _, counts in found:
        torch.testing.assert_close(loss, one(gate))
        assert torch.equal(counts, routed(params, x).counts)
    torch.testing.assert_close(found[0][1] + found[1][1], torch.func.grad(one)(gate))
    torch.testing.assert_close(
        load_balancing(routed(params, x), CONFIG, kind="global"), load_balancing(routed(params, x), CONFIG)
    )


HOW = ["backward", "grad", "vmap", "compile", "compiled grad", "checkpoint"]


@pytest.mark.parametrize("how", HOW)
def test_losses_and_attach_under_every_transform(how: str) -> None:
    params, x, mask = made()
    gate = params["gate.weight"]

    def task(gate: Tensor, x: Tensor, attached: bool = True) -> Tensor:
        y, found = fmoe.moe({**params, "gate.weight": gate}, x, CONFIG, return_routed=True)
        loss = load_balancing(found, CONFIG, mask=mask, kind="sequence") + 0.1 * router_z(found, mask=mask)
        y2 = attach(y, loss, 0.5) if attached else y
        return y2.square().sum() + (0 if attached else 0.5 * loss)

    want = torch.func.grad(lambda g, x: task(g, x, False), (0, 1))(gate, x)
    grad = torch.func.grad(task, (0, 1))
    if how == "vmap":
        gates = torch.stack([gate, 2 * gate])
        found = tuple(g[0] for g in torch.vmap(grad, (0, None))(gates, x))
        shared = torch.func.grad(lambda g: torch.vmap(task, (None, 0))(g, torch.stack([x, x])).sum())(gate)
        torch.testing.assert_close(shared, 2 * want[0])
    elif how in ("grad", "compiled grad"):
        found = (torch.compile(grad, fullgraph=True, backend="aot_eager") if "compiled" in how else grad)(gate, x)
    else:
        leaves = [t.clone().requires_grad_() for t in (gate, x)]
        run = {
            "compile": torch.compile(task, fullgraph=True, backend="aot_eager"),
            "checkpoint": lambda *a: torch.utils.checkpoint.checkpoint(task, *a, use_reentrant=False),
        }.get(how, task)
        run(*leaves).backward()
        found = tuple(t.grad for t in leaves)
    torch._dynamo.reset()
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_attach_leaves_y_as_it_is_and_may_be_added_to() -> None:
    y, loss = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = attach(y, loss, 3.0)
    assert torch.equal(out, y) and not out._is_view()
    out += 1
    (7 * out.sum()).backward()
    assert loss.grad == 3 and y.grad.tolist() == [7, 7, 7]  # type: ignore[union-attr]
