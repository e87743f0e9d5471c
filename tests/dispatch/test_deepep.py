"""The dispatcher `deepep`. L0: logic. L1: a strict simulator, on threads and processes. L2: published signatures.

L3, on a GPU with DeepEP itself (`gpu_deep_ep.py`), and L4, on several, have not been run.

The simulator's `exact` mode carries fp64 in rows of any width, so that parity is asked to 1e-12: it checks where rows
and gradients go. Everything else is bf16 within all limits: `test_deepep_rows.py`, `test_deepep_refusals.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import dispatchers
import distributed
import naive
import pytest
import test_dispatch
import test_dispatch_sums
import threads
import torch
import torch.distributed as dist
from deepep_cases import KINDS, WIDE, each_kind, lone
from dispatchers import CASES, CONFIG, WAYS, Off, batch, grads, of_rank, share
from hypothesis import given, settings
from routings import Case, cases, laws
from simulate_deep_ep import installed
from torch import Tensor

from fmoe import Routing
from fmoe.dispatch import deepep, deepep_wire
from fmoe.dispatch.deepep import Plan, _back, _forth, _plan
from fmoe.dispatch.local import local
from fmoe.dispatch.pair import pair

PLAN = {"buffer": ["get_dispatch_layout", "dispatch"], "elastic": ["dispatch"]}


def distinct(indices: Tensor) -> Tensor:
    """An expert that a token names again becomes -1."""
    K = indices.shape[1]
    before = torch.tril(torch.ones(K, K, dtype=torch.bool), -1)
    return indices.masked_fill(((indices[:, :, None] == indices[:, None]) & before).any(2), -1)


def once(change: Callable[..., None]) -> Callable[..., None]:
    def changed(x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor) -> None:
        change(x, indices, weights, mask)
        indices.copy_(distinct(indices))

    return changed


# V2 takes no expert twice of one token; V1 does
DISTINCT = {f"{name}, once": (lengths, once(change)) for name, (lengths, change) in CASES.items()}
CASES_OF = {"buffer": CASES, "elastic": DISTINCT}


@pytest.fixture(autouse=True, scope="module")
def cases_by_name() -> Iterator[None]:
    dispatchers.CASES = CASES | DISTINCT
    yield
    dispatchers.CASES = CASES


def parity(kind: str, ways: tuple[str, ...] = tuple(WAYS)) -> list[Off]:
    """`dispatchers.parity`, of an installed simulator."""
    R, rank, found = dist.get_world_size(), dist.get_rank(), list[Off]()
    with deepep(None, CONFIG, max_tokens=32, api=kind) as d:
        for case, way in product(CASES_OF[kind], ways):
            lengths, x, routing, r = batch(case, R)
            params = share(naive.draw(CONFIG), R, rank)
            x, r, *routed = of_rank((x, r, *routing), lengths, rank)
            for key, t in grads(WAYS[way](d), params, x, Routing(*routed), r).items():
                whole = dispatchers.expected(case, R)[key]
                right = share({key: whole}, R, rank)[key] if key in params else of_rank([whole], lengths, rank)[0]
                size = max(float(right.abs().max()), 1.0) if t.numel() else 1.0
                found.append(Off(case, way, key, float((t - right).norm()) / size))
    return found


def parity_of_a_process(ways: tuple[str, ...]) -> list[Off]:
    dispatchers.CASES, found = CASES | DISTINCT, list[Off]()
    for kind in KINDS:
        with installed(kind, exact=True):
            found += parity(kind, ways)
    return found


def check(ranks: list[list[Off]], n_ways: int) -> None:
    for rank, found in enumerate(ranks):
        assert len(found) == len(CASES) * n_ways * (1 + 2 + 4)
        wrong = [off for off in found if not off.off <= 1e-12]
        assert not wrong, f"rank {rank}: {len(wrong)} of {len(found)}, such as {wrong[:3]}"


@each_kind
@pytest.mark.parametrize("R", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_L1_a_group_is_one_device(kind: str, R: int) -> None:
    with installed(kind, exact=True) as world:
        check(threads.run(parity, R, kind), len(WAYS))
    assert sorted(world.destroyed) == list(range(R))


@pytest.mark.parametrize("R, ways", [(2, ("plain", "recompute")), pytest.param(4, tuple(WAYS), marks=pytest.mark.slow)])
def test_L1_a_group_of_processes_is_one_device(R: int, ways: tuple[str, ...]) -> None:
    check(distributed.run(parity_of_a_process, R, ways, timeout=240), 2 * len(ways))


def test_L1_the_buffer_of_one_rank_which_a_gpu_alone_could_run() -> None:
    """What `gpu_deep_ep.py` does: V2 takes one rank, which `deepep` gives `local`."""

    def run() -> None:
        x, routing = lone(5)
        with pair(deepep_wire.Wire(None, WIDE, 8, "elastic", {}), Plan, _plan, _forth, _back) as d:
            plan, other = d.plan(routing, WIDE), local.plan(routing, WIDE)
            for mine, right in zip(
                d.dispatch(x, routing.weights, plan), local.dispatch(x, routing.weights, other), strict=True
            ):
                assert torch.equal(mine, right)

    with installed("elastic"):
        threads.run(run, 1)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws of `test_dispatch`, of a dispatcher that is made for a config."""

    def everywhere(kind: str, drawn: list[Case], law: Any) -> list[Any]:
        def run() -> Any:
            case = drawn[dist.get_rank()]
            K = case.routing.indices.shape[1]
            E = max(case.config.n_routed_experts, K)  # K may be more than E; a buffer is made for as many
            made = replace(case.config, n_activated_experts=min(K, E))
            with deepep(None, made, max_tokens=8, api=kind) as comm:
                return law(comm, case)

        with installed(kind, exact=True):
            return threads.run(run, len(drawn))

    monkeypatch.setattr(test_dispatch, "everywhere", everywhere)


def fits(draw: Callable[[int], list[Case]], kind: str) -> Callable[[int], list[Case]]:
    def one(case: Case) -> Case:
        (indices, weights, mask), config, x, _ = case
        E = config.n_routed_experts
        indices, weights = indices[:, :E], weights[:, :E]
        indices = distinct(indices) if kind == "elastic" else indices
        n = ((indices >= 0) & (indices < E) & (True if mask is None else mask[:, None])).sum(1)
        return Case(Routing(indices, weights, mask), config, x, n)

    return lambda R: [one(case) for case in draw(R)]


LAWS = ("transposes", "combine_of_dispatch_counts_the_copies", "rows_are_sorted_by_expert_and_carry_their_weight")


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("R", [2, 4])
@each_kind
@settings(laws, max_examples=20)
@given(draw=cases())
def test_L1_the_laws(kind: str, R: int, law: str, draw: Any) -> None:
    """Those of every dispatcher: transposes, copies counted, rows sorted in the order of one device."""
    getattr(test_dispatch, f"test_{law}").hypothesis.inner_test(kind, R, fits(draw, kind))


@pytest.mark.usefixtures("everywhere")
@each_kind
def test_L1_torch_func_grad_and_its_own_grad(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {kind: lambda group: deepep(group, CONFIG, max_tokens=8)}
    monkeypatch.setattr(test_dispatch_sums, "DISPATCHERS", made)
    monkeypatch.setattr(test_dispatch_sums, "batch", lambda name, R: batch(f"{name}, once", R))
    with installed(kind, exact=True):
        test_dispatch_sums.test_func_grad_is_backward(kind)


def train(kind: str, way: str) -> list[str]:
    """The calls of rank 0 in one step."""

    def run() -> None:
        lengths, x, routing, r = batch("nowhere, once", 2)
        x, r, *routed = of_rank((x, r, *routing), lengths, dist.get_rank())
        with deepep(None, CONFIG, max_tokens=8) as d:
            grads(WAYS[way](d), share(naive.draw(CONFIG), 2, dist.get_rank()), x, Routing(*routed), r)

    with installed(kind, exact=True) as world:
        threads.run(run, 2)
    assert world.of(0) == world.of(1)
    return world.of(0)


@each_kind
@pytest.mark.parametrize("way", WAYS)
def test_L1_a_layout_is_made_once_and_every_step_replays_it(kind: str, way: str) -> None:
    again = {
        "recompute": ["cached", "combine"],
        "checkpoint": ["cached"],
        "checkpoint, reentrant": ["cached", "combine"],
    }
    forward = [*PLAN[kind], "cached", "combine"]
    assert train(kind, way) == [*forward, *again.get(way, []), "cached", "combine", "destroy"]
