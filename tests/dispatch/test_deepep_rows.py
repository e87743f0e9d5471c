"""The dispatcher `deepep` in bf16: what crosses, what is summed, what a plan is, and the calls it makes."""

import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import naive
import published
import pytest
import threads
import torch
import torch.distributed as dist
from deepep_cases import WIDE, each_kind, lone, said
from dispatchers import CONFIG, grads, share
from simulate_deep_ep import installed
from torch import Tensor
from torch.utils import _pytree as pytree

import fmoe
from fmoe import Routing
from fmoe.dispatch import deepep, deepep_wire
from fmoe.dispatch.local import local


@each_kind
@pytest.mark.parametrize("lengths", [(5, 3), (0, 4), (0, 0)])
def test_L1_in_bf16_within_every_limit(kind: str, lengths: tuple[int, ...]) -> None:
    """Rounded once per rank and once more: y and gradients to 1e-2 of those of one device, fp32 weights and all."""
    params = {name: p * 0.3 for name, p in naive.draw(WIDE, torch.float32).items()}
    batches = [lone(T, seed=rank) for rank, T in enumerate(lengths)]

    def run() -> dict[str, Tensor]:
        rank = dist.get_rank()
        x, routing = batches[rank]
        with deepep(None, WIDE, max_tokens=8) as d:
            layer = partial(fmoe.experts, config=WIDE, dispatcher=d, backend="loop")
            return grads(lambda p, x, r: layer(p, x, r), share(params, 2, rank), x, routing, torch.ones_like(x))

    with installed(kind):
        found = threads.run(run, 2)
    x, routing = (
        torch.cat([x for x, _ in batches]),
        Routing(*map(torch.cat, zip(*(r for _, r in batches), strict=True))),
    )
    layer = partial(fmoe.experts, config=WIDE, backend="loop")
    right = grads(lambda p, x, r: layer(p, x, r), params, x, routing, torch.ones_like(x))
    for name, t in right.items():
        mine = torch.cat([theirs[name] for theirs in found])
        assert mine.dtype == t.dtype and not mine.isnan().any()
        naive.near(mine, t, 1e-2)


@each_kind
def test_L1_weights_cross_bit_by_bit_and_foreign_ones_stay_unseen(kind: str) -> None:
    """fp32 weights of rows in bf16, none of them a weight of another rank's expert; sums of a rank in fp32."""

    def run() -> None:
        rank = dist.get_rank()
        x, routing = lone(6, seed=rank)
        with deepep(None, WIDE, max_tokens=8) as d:
            plan = d.plan(routing, WIDE)
            rows = d.dispatch(x, routing.weights, plan)
            assert rows.weights.dtype == torch.float32 and rows.x.dtype == torch.bfloat16
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, (x, routing))
            sent = [
                (int(e), float(w), xs[t].tolist())
                for xs, (ids, ws, mask) in everyone
                for t in range(6)
                for e, w in zip(ids[t], ws[t], strict=True)
                if mask[t] and e // 4 == rank
            ]
            expert = torch.arange(4).repeat_interleave(rows.counts) + 4 * rank
            got = list(zip(expert.tolist(), rows.weights.tolist(), rows.x.tolist(), strict=True))
            assert got == sorted(sent, key=lambda row: row[0])
            one = d.combine(torch.ones(len(rows.x), 256), plan)
            assert torch.equal(one[:, 0], 3.0 * routing.mask) and one.dtype == torch.float32

    with installed(kind):
        threads.run(run, 2)


@each_kind
def test_L1_sums_of_one_rank_are_fp32_in_both_directions(kind: str) -> None:
    """256 + 1 + 1 is 256 when bf16 rounds after every addition, 258 in fp32; 256.75 + 0.75, when it rounds before."""
    r = torch.tensor([[256.0], [1.0], [1.0]]).expand(3, 256).bfloat16()
    wide = torch.tensor([[256.75], [0.75], [0.0]]).expand(3, 256)

    def run() -> None:
        mine = dist.get_rank() == 0
        routing = Routing(torch.tensor([[0, 1, 2]])[: int(mine)], torch.ones(1, 3)[: int(mine)])
        x = torch.ones(int(mine), 256, dtype=torch.bfloat16, requires_grad=True)
        with deepep(None, WIDE, max_tokens=8) as d:
            plan = d.plan(routing, WIDE)
            rows = d.dispatch(x, routing.weights, plan)
            y = d.combine(r[: len(rows.x)], plan)
            before = d.combine(wide[: len(rows.x)], plan)
            (dx,) = torch.autograd.grad(rows.x, x, r[: len(rows.x)])
            assert not mine or (y[0, 0].item(), before[0, 0].item(), dx[0, 0].item()) == (258, 258, 258)

    with installed(kind):
        threads.run(run, 2)


@each_kind
def test_L1_a_plan_is_a_value(kind: str) -> None:
    """A pytree of integers that holds the handle: another of the same leaves gives the same rows, and no layout."""

    def run() -> None:
        x, routing = lone(6, seed=dist.get_rank())
        weights = routing.weights.requires_grad_()
        with deepep(None, WIDE, max_tokens=8) as d:
            plan, other = d.plan(routing, WIDE), d.plan(lone(5, seed=9)[1], WIDE)
            leaves, spec = pytree.tree_flatten(plan)
            assert all(isinstance(t, Tensor) and not t.is_floating_point() and not t.requires_grad for t in leaves)
            again = pytree.tree_unflatten([t.clone() for t in leaves], spec)
            first, second = (d.dispatch(x, weights, p) for p in (plan, again))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert torch.equal(d.combine(first.x, again), d.combine(first.x, plan))
            assert other.n_rows != plan.n_rows or not torch.equal(other.slot_ids, plan.slot_ids)

    with installed(kind) as world:
        threads.run(run, 2)
    assert world.of(0).count("dispatch") == 2


@each_kind
def test_L2_every_call_binds_to_what_was_published(kind: str) -> None:
    """The simulator binds each call to the signature recorded from 2.1.0, and takes keywords alone."""

    def run() -> None:
        x, routing = lone(4, seed=dist.get_rank())
        with deepep(None, WIDE, max_tokens=8) as d:
            layer = partial(fmoe.experts, config=WIDE, dispatcher=d, backend="loop")
            grads(lambda p, x, r: layer(p, x, r), share(naive.draw(WIDE), 2, dist.get_rank()), x, routing, x)

    with installed(kind) as world:
        threads.run(run, 2)
    name = {"buffer": "Buffer.", "elastic": "ElasticBuffer."}[kind]
    recorded = {f for f in published.recorded()["sgl_deep_ep-0.1.2.post1"] if f.startswith(name) and "_config" not in f}
    assert {f for _, f, _ in world.calls} == recorded
    spec = find_spec("deep_ep")
    for root in map(Path, (spec.submodule_search_locations or ()) if spec else ()):  # nothing to read where it is not
        for file, names in published.CALLED["sgl_deep_ep"].items():
            theirs = published.parsed((root.parent / file).read_text(), names) if (root.parent / file).exists() else {}
            for _, f, how in world.calls:
                if f in theirs:
                    published.signature(theirs[f]).bind(**how)


def test_L0_one_rank_is_local_and_needs_nothing() -> None:
    assert "deep_ep" not in sys.modules
    assert threads.run(lambda: deepep(None, replace(CONFIG, dim=7)) is local, 1) == [True]
    assert said(lambda: deepep(None, CONFIG)).startswith("RuntimeError: deepep: no process group")


@pytest.mark.parametrize("D, K", [(2048, 8), (7168, 8), (2880, 4), (256, 1), (6, 3)])
def test_L0_rows_have_room_for_the_bits_of_their_weights(D: int, K: int) -> None:
    width = deepep_wire.columns(D, K)
    assert 0 <= width - (D + 2 * K) < 16 and width * 2 % 32 == 0
