"""Ranks that disagree, die or stall: every other rank raises, in time, and says where. In processes of their own."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import distributed
import pytest
import threads
import torch
import torch.distributed as dist
from dispatchers import CONFIG, DISPATCHERS, OVER_GROUPS

from fmoe.dispatch import Dispatcher, all_gather, all_to_all
from fmoe.types import MoEConfig, Routing

T, K = 4, 2


def routing(K: int = K, dtype: torch.dtype = torch.float64) -> Routing:
    return Routing(torch.arange(T * K).view(T, K) % CONFIG.n_routed_experts, torch.ones(T, K, dtype=dtype))


def error(f: Callable[[], Any]) -> str:
    try:
        f()
    except (ValueError, RuntimeError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing was raised"


# what rank 1 has that rank 0 has not, and what both must say of it
DISAGREE: dict[str, tuple[MoEConfig, Routing, str]] = {
    "E": (replace(CONFIG, n_routed_experts=16), routing(), "E: 8 on rank 0; 16 on rank 1"),
    "uneven E": (replace(CONFIG, n_routed_experts=7), routing(), "E: 8 on rank 0; 7 on rank 1"),
    "K": (CONFIG, routing(3), "K: 2 on rank 0; 3 on rank 1"),
    "D": (replace(CONFIG, dim=5), routing(), "D: 6 on rank 0; 5 on rank 1"),
    "dtype": (replace(CONFIG, dtype=torch.bfloat16), routing(), "dtype of x: float64 on rank 0; bfloat16 on rank 1"),
    "weights": (CONFIG, routing(dtype=torch.float32), "dtype of weights: float64 on rank 0; float32 on rank 1"),
}


def step(d: Dispatcher) -> None:
    plan = d.plan(routing(), CONFIG)
    rows = d.dispatch(torch.ones(T, CONFIG.dim).double(), routing().weights, plan)
    assert torch.equal(d.combine(rows.x, plan), torch.full((T, CONFIG.dim), float(K)).double())


def disagreements() -> dict[str, str]:
    odd, found = dist.get_rank() == 1, {}
    for name in OVER_GROUPS:
        with DISPATCHERS[name](None) as d:
            for what, (config, routed, _) in DISAGREE.items():
                found[f"{name} {what}"] = error(lambda: d.plan(*((routed, config) if odd else (routing(), CONFIG))))  # noqa: B023
            found[f"{name} shares"] = error(lambda: d.plan(routing(), replace(CONFIG, n_routed_experts=7)))  # noqa: B023
            step(d)  # nothing is left behind: the group works on
    with all_gather() if odd else all_to_all() as d:
        found["dispatcher"] = error(lambda: d.plan(routing(), CONFIG))
    return found


def test_ranks_that_disagree_all_raise_before_any_row_moves() -> None:
    for rank, found in enumerate(distributed.run(disagreements, 2, timeout=60)):
        for name in OVER_GROUPS:
            for what, (_, _, told) in DISAGREE.items():
                said = found.pop(f"{name} {what}")
                assert said.startswith(f"ValueError: {name}: plan: the ranks disagree on {told}"), (rank, said)
                assert "Expected on all ranks one" in said
            shares = found.pop(f"{name} shares")
            assert shares.startswith(f"ValueError: {name}: plan: 7 experts on 2 ranks, expected E % ranks == 0"), shares
        assert "disagree on dispatcher: all_to_all on rank 0; all_gather on rank 1" in found.pop("dispatcher")
        assert not found


STEPS = ("plan", "dispatch", "combine", "backward of combine", "backward of dispatch")


def die(name: str, at: int, stall: float = 0) -> tuple[str, float, str]:
    """Rank 1 kills itself, or stalls, before the at-th step; what others say, after how many seconds, and next."""
    group = dist.new_group(timeout=timedelta(seconds=stall / 2)) if stall else None
    d, dies = DISPATCHERS[name](group), dist.get_rank() == 1
    config = replace(CONFIG, n_routed_experts=6)  # for two ranks or three

    def next_step(i: int) -> None:
        if dies and i == at:
            time.sleep(stall)
            os.kill(os.getpid(), signal.SIGKILL)

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: torch.Tensor, i: int) -> torch.Tensor:
            ctx.i = i
            return t.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
            next_step(ctx.i)
            return g, None

    def train() -> None:
        next_step(0)
        plan = d.plan(routing(), config)
        next_step(1)
        x = torch.ones(T, CONFIG.dim, requires_grad=True, dtype=torch.float64)
        rows = d.dispatch(x, routing().weights, plan)
        next_step(2)
        y = d.combine(Step.apply(rows.x, 4), plan)
        Step.apply(y, 3).sum().backward()

    start = time.monotonic()
    said = error(train)
    took = time.monotonic() - start
    return said, took, error(lambda: d.plan(routing(), config))


@pytest.mark.parametrize(
    "name, at",
    [
        pytest.param(name, at, marks=() if (name, at) in {("all_to_all", 2), ("all_gather", 4)} else pytest.mark.slow)
        for name in OVER_GROUPS
        for at in range(len(STEPS))
    ],
)
def test_a_rank_that_is_killed_is_noticed_by_all_others(name: str, at: int) -> None:
    found = distributed.run(die, 3, name, at, timeout=90, dies=[1])
    for rank in (0, 2):
        said, took, after = found[rank]
        assert said.startswith(f"RuntimeError: {name}: {STEPS[at]}: failed on rank {rank} of 3: "), said
        assert "the first error of any rank is the cause" in said and took < 30
        assert after == f"RuntimeError: {name}: plan: an earlier collective failed on rank {rank}: make a new group"


@pytest.mark.parametrize("name, at", [("all_to_all", 1), pytest.param("all_gather", 2, marks=pytest.mark.slow)])
def test_a_rank_that_stalls_is_noticed_within_the_timeout(name: str, at: int) -> None:
    ((said, took, _), _) = distributed.run(die, 2, name, at, 6.0, timeout=60, dies=[1])
    assert said.startswith(f"RuntimeError: {name}: {STEPS[at]}: failed on rank 0 of 2: "), said
    assert 2 < took < 5.5


def alone(name: str) -> None:
    x, w = torch.ones(T, CONFIG.dim).double(), routing().weights
    d, config = DISPATCHERS[name](None), replace(CONFIG, dtype=torch.float32)
    plan, narrow = d.plan(routing(), CONFIG), d.plan(routing(dtype=torch.float32), config)
    foreign = DISPATCHERS["local"](None).plan(routing(), CONFIG)
    rows = d.dispatch(x, w, plan).x
    for told, f in {
        "dispatch: x is torch.float32 [4, 6], the plan was made for torch.float64 [4, 6]": lambda: d.dispatch(
            x.float(), w, plan
        ),
        "dispatch: x is torch.float64 [3, 6], the plan": lambda: d.dispatch(x[1:], w, plan),
        "dispatch: weights is torch.float64 [4, 1], the plan was made for floating [4, 2]": lambda: d.dispatch(
            x, w[:, :1], plan
        ),
        "dispatch: weights are torch.float64, wider than the torch.float32": lambda: d.dispatch(x.float(), w, narrow),
        "combine: rows is torch.float64 [7, 6], the plan was made for": lambda: d.combine(rows[1:], plan),
        "combine: plan is a Plan of fmoe.dispatch.local, expected one that it made": lambda: d.combine(rows, foreign),
    }.items():
        assert error(f).startswith(f"ValueError: {name}: {told}"), error(f)
    step(d)  # nothing of it harms the next step
    with d:
        lost = d.dispatch(x.requires_grad_(), w, plan).x
    for word, f in {
        "plan": lambda: d.plan(routing(), CONFIG),
        "dispatch": lambda: d.dispatch(x, w, plan),
        "combine": lambda: d.combine(rows, plan),
        "backward of dispatch": lambda: lost.sum().backward(),
    }.items():
        assert error(f) == f"RuntimeError: {name}: {word}: it is closed: make another, or close it later"


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_what_does_not_fit_its_plan_and_what_is_closed(name: str) -> None:
    threads.run(alone, 1, name)


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_without_a_group_and_outside_of_it(name: str) -> None:
    assert error(lambda: DISPATCHERS[name](None)) == (
        f"RuntimeError: {name}: no process group, expected torch.distributed.init_process_group() before"
    )

    def outside() -> str:
        group = dist.new_group([0])
        return "" if dist.get_rank() == 0 else error(lambda: DISPATCHERS[name](group))

    said = threads.run(outside, 2)[1]
    assert said == f"ValueError: {name}: this process is not in the group, expected one of its ranks to ask"
