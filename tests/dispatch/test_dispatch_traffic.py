"""What crosses between ranks, counted call by call and byte by byte, and that a plan is never made twice."""

from dataclasses import replace

import naive
import pytest
import threads
import torch
import torch.distributed as dist
from dispatchers import CONFIG, DISPATCHERS, OVER_GROUPS, WAYS, batch, counted, grads, of_rank, share

from fmoe.types import Routing

R = 2
CASE = "nowhere"  # some slots go nowhere, and ranks have unequal numbers of tokens
PLAN = {"all_to_all": ["all_to_all_single"], "all_gather": ["all_to_all_single", "all_gather"]}
FORTH = {"all_to_all": "all_to_all_single", "all_gather": "all_gather"}  # dispatch, and combine's backward
BACK = {"all_to_all": "all_to_all_single", "all_gather": "all_to_all_single"}  # combine, and dispatch's backward


def train(name: str, way: str) -> list[tuple[str, int]]:
    """(verb, bytes) of each collective of a step of rank 0, forward and backward."""

    def run() -> None:
        rank = dist.get_rank()
        lengths, x, routing, r = batch(CASE, R)
        x, r, *routed = of_rank((x, r, *routing), lengths, rank)
        with DISPATCHERS[name](None) as d:
            grads(WAYS[way](d), share(naive.draw(CONFIG), R, rank), x, Routing(*routed), r)

    with counted() as calls:
        threads.run(run, R)
    assert {rank: [verb for r, verb, _ in calls if r == rank] for rank in range(R)}[1] == [
        v for r, v, _ in calls if r == 0
    ]
    return [(verb, size) for rank, verb, size in calls if rank == 0]


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_a_step_is_a_plan_and_four_collectives(name: str) -> None:
    verbs = [verb for verb, _ in train(name, "plain")]
    assert verbs == [*PLAN[name], FORTH[name], BACK[name], FORTH[name], BACK[name]]


@pytest.mark.parametrize("way", ["recompute", "checkpoint", "checkpoint, reentrant"])
@pytest.mark.parametrize("name", OVER_GROUPS)
def test_recomputation_keeps_the_plan(name: str, way: str) -> None:
    """No second exchange of counts: only rows move again, the first thing in backward."""
    verbs = [verb for verb, _ in train(name, way)]
    assert verbs[: len(PLAN[name]) + 2] == [*PLAN[name], FORTH[name], BACK[name]]
    again = verbs[len(PLAN[name]) + 2 :]
    # a checkpoint stops where backward has all it needs: after the products, so that combine is not repeated
    combined = [] if way == "checkpoint" else [BACK[name]]
    assert again == [FORTH[name], *combined, FORTH[name], BACK[name]]


def test_all_to_all_sends_every_routed_row_once_each_way_and_nothing_else() -> None:
    lengths, _, (indices, _, mask), _ = batch(CASE, R)
    T, E, D = lengths[0], CONFIG.n_routed_experts, CONFIG.dim
    mine = indices[:T][mask[:T]] if mask is not None else indices[:T]
    n_sent = int(((mine >= 0) & (mine < E)).sum())
    here = indices[((indices >= 0) & (indices < E // R)) & (mask[:, None] if mask is not None else True)]
    assert 0 < n_sent < indices[:T].numel()
    (_, plan), (_, forth), (_, back), (_, dy), (_, dx) = train("all_to_all", "plain")
    assert (forth, dy) == (n_sent * (8 * D + 8), n_sent * 8 * D)  # a row and its weight, in fp64
    assert (back, dx) == (len(here) * 8 * D, len(here) * (8 * D + 8))
    assert plan == R * 8 * (6 + 1024 // R)  # six facts, and room for the counts of 1024 experts


@pytest.mark.parametrize("name", OVER_GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_cross_in_their_own_dtype_and_sums_in_fp32(name: str, dtype: torch.dtype) -> None:
    T, K, D = 4, 2, 6
    config = replace(CONFIG, dtype=dtype, n_activated_experts=K)

    def run() -> None:
        with DISPATCHERS[name](None) as d:
            plan = d.plan(Routing(torch.zeros(T, K).long(), torch.ones(T, K)), config)
            rows = d.dispatch(torch.ones(T, D, dtype=dtype), torch.ones(T, K), plan)
            d.combine(rows.x, plan)

    with counted() as calls:
        threads.run(run, 1)
    forth, back = (size for _, _, size in calls[-2:])
    copies, each = (T * K, 1) if name == "all_to_all" else (T, K)
    assert (forth, back) == (copies * (D * dtype.itemsize + each * 4), copies * D * 4)


def test_all_gather_hands_every_partial_sum_to_the_rank_of_its_token_alone() -> None:
    """A reduce-scatter: no rank hands over more than one number for each of all tokens, where an all_reduce has two."""
    lengths, K, D = batch(CASE, R).lengths, CONFIG.n_activated_experts, CONFIG.dim
    assert lengths[0] != lengths[1]
    _, plan, forth, back, dy, dx = train("all_gather", "plain")
    assert plan == ("all_gather", max(lengths) * K * 4)
    assert forth == ("all_gather", max(lengths) * (D + K) * 8) and dy == ("all_gather", max(lengths) * D * 8)
    assert (back[1], dx[1]) == (sum(lengths) * D * 8, sum(lengths) * (D + K) * 8)
