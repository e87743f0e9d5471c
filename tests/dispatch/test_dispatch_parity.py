"""Every dispatcher, on processes and on threads, is one device to rounding: outputs and every gradient, in fp64.

`dispatchers.CASES` x `dispatchers.WAYS`, plain, recomputed and checkpointed, all in one start of the ranks.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import dispatchers
import distributed
import naive
import pytest
import threads
import torch
import torch.distributed as dist
from dispatchers import CASES, CONFIG, DISPATCHERS, OVER_GROUPS, WAYS, E, Off, share
from simulate_deep_ep import installed
from torch import Tensor

import fmoe
from fmoe.dispatch import Dispatcher, deepep
from fmoe.types import INTEGERS

HARNESSES = {"processes": distributed.run, "threads": threads.run}
RANKS = [("processes", 1), ("processes", 2), ("processes", 4), ("threads", 2), ("threads", 4), ("threads", 8)]


@cache
def parity(harness: str, R: int) -> list[dict[str, list[Off]]]:
    names = OVER_GROUPS if R > 1 else tuple(DISPATCHERS)
    return HARNESSES[harness](dispatchers.parity, R, names, timeout=240)


@pytest.mark.parametrize(
    "name, harness, R", [("local", "processes", 1), *((n, *r) for n in OVER_GROUPS for r in RANKS)]
)
def test_a_group_is_one_device(name: str, harness: str, R: int) -> None:
    for rank, found in enumerate(parity(harness, R)):
        assert len(found[name]) == len(CASES) * len(WAYS) * (1 + 2 + 4)
        wrong = [off for off in found[name] if not off.off <= 1e-12]
        assert not wrong, f"rank {rank}: {len(wrong)} of {len(found[name])}, such as {wrong[:3]}"


@pytest.mark.parametrize("name", OVER_GROUPS)
def test_a_whole_block_and_lora_on_a_group(name: str) -> None:
    """`moe` with a router and a shared expert on every rank, LoRA on each rank's experts: y, as of one device."""
    R, rank_of_lora = 2, 3
    config = replace(CONFIG, n_shared_experts=1, inter_dim=5)
    generator = torch.Generator().manual_seed(3)
    noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    D, I = config.dim, config.moe_inter_dim
    stacks = naive.draw(config)
    for part, i, o in (("gate_and_up", D, 2 * I), ("down", I, D)):
        stacks[f"lora_{part}_A"], stacks[f"lora_{part}_B"] = noise(E, i, rank_of_lora), noise(E, rank_of_lora, o)
    rest = {"gate.weight": noise(E, D), "shared_experts.gate_proj.weight": noise(I, D)}
    rest |= {"shared_experts.up_proj.weight": noise(I, D), "shared_experts.down_proj.weight": noise(D, I)}
    x, lengths = noise(7, D), [5, 2]

    def block(stacks: dict[str, Tensor], x: Tensor, d: Dispatcher) -> Tensor:
        return fmoe.moe(rest | {f"experts.{n}": p for n, p in stacks.items()}, x, config, dispatcher=d, backend="loop")

    def run() -> Tensor:
        rank = dist.get_rank()
        with DISPATCHERS[name](None) as d:
            return block(share(stacks, R, rank), x.split(lengths)[rank], d)

    found = torch.cat(threads.run(run, R))
    torch.testing.assert_close(found, block(stacks, x, fmoe.dispatch.local), rtol=1e-12, atol=1e-12)


INTS = [d for d in INTEGERS if d != torch.int64]


@pytest.mark.parametrize("name", [*OVER_GROUPS, "buffer", "elastic"])
def test_ids_in_every_integer_dtype_reach_their_experts(name: str) -> None:
    """200 experts, which int8 does not count to; the plan itself takes them too, not `experts` alone."""
    R, config = 2, replace(CONFIG, n_routed_experts=200, n_activated_experts=2)
    made = DISPATCHERS.get(name, lambda group: deepep(group, config, max_tokens=8, api=name))
    ids = torch.tensor([[0, 100], [127, 1], [99, 120], [126, 7]])

    def run() -> None:
        rank = dist.get_rank()
        held = {n: p[100 * rank : 100 * rank + 100] for n, p in naive.draw(config).items()}
        x = torch.randn(2, config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        mine, weights = ids[2 * rank : 2 * rank + 2], torch.ones(2, 2, dtype=torch.float64)
        with made(None) as d:
            call = lambda ids: fmoe.experts(held, x, fmoe.Routing(ids, weights), config, dispatcher=d, backend="loop")
            right, counts = call(mine), d.plan(fmoe.Routing(mine, weights), config).counts
            for dtype in INTS:
                assert torch.equal(call(mine.to(dtype)), right), dtype
                assert torch.equal(d.plan(fmoe.Routing(mine.to(dtype), weights), config).counts, counts), dtype
        assert counts.sum() and right.any()

    with nullcontext() if name in DISPATCHERS else installed(name, exact=True):
        threads.run(run, R)
