"""Random routings of every rank of a group, and a law asked of a dispatcher on each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import threads
import torch
from dispatchers import DISPATCHERS, OVER_GROUPS
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fmoe.dispatch import Dispatcher
from fmoe.types import MoEConfig, Routing


class Case(NamedTuple):
    """A routing with masked, negative, foreign and repeated experts, x [T, D], and n [T] experts for each token."""

    routing: Routing
    config: MoEConfig
    x: Tensor
    n: Tensor


@st.composite
def cases(draw: st.DrawFn) -> Callable[[int], list[Case]]:
    """One case for each of R ranks, of one config."""
    K, D, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 6), min_size=4, max_size=4))
    masks = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    seed, wild = draw(st.integers(0, 9999)), draw(st.booleans())

    def one(rank: int, R: int) -> Case:
        T, E, generator = lengths[rank], per_rank * R, torch.Generator().manual_seed(seed + rank)
        ids = torch.tensor([*range(E), *([-1, E, E + 100] if wild else [])])
        indices = ids[torch.randint(0, len(ids), (T, K), generator=generator)]
        mask = torch.rand(T, generator=generator) < 0.7 if masks[rank] else None
        x = torch.randn(T, D, dtype=torch.float64, generator=generator)
        weights = torch.rand(T, K, dtype=torch.float64, generator=generator)
        n = ((indices >= 0) & (indices < E) & (True if mask is None else mask[:, None])).sum(1)
        config = MoEConfig(
            n_routed_experts=E, n_activated_experts=min(E, K), dim=D, moe_inter_dim=1, dtype=torch.float64
        )
        return Case(Routing(indices, weights, mask), config, x, n)

    return lambda R: [one(rank, R) for rank in range(R)]


laws = settings(deadline=None, max_examples=40)


def everywhere(name: str, cases: list[Case], law: Callable[[Dispatcher, Case], Any]) -> list[Any]:
    """[law(dispatcher, case) on each rank]."""

    def run() -> Any:
        with DISPATCHERS[name](None) as comm:
            return law(comm, cases[torch.distributed.get_rank() if name in OVER_GROUPS else 0])

    return threads.run(run, len(cases)) if name in OVER_GROUPS else [run()]


def lone(routing: Routing, x: Tensor, E: int) -> list[Case]:
    config = MoEConfig(n_routed_experts=E, n_activated_experts=1, dim=x.shape[1], moe_inter_dim=1, dtype=x.dtype)
    return [Case(routing, config, x, torch.ones(len(x)))]
