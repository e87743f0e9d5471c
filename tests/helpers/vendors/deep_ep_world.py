"""What both generations of the simulated DeepEP share: the calls made, rows moved over a group, and checks."""

from types import SimpleNamespace
from typing import Any

import published
import torch
import torch.distributed as dist
from torch import Tensor

SIGNATURES = published.recorded()["sgl_deep_ep-0.1.2.post1"]
EVENT = SimpleNamespace(event=None)


class World:
    """What was called: (rank, function, arguments). exact: rows and weights in fp64, of any even width."""

    def __init__(self, exact: bool) -> None:
        self.calls: list[tuple[int, str, dict[str, Any]]] = []
        self.exact, self.destroyed, self.handles = exact, list[int](), 0
        self.rows, self.weights = (torch.float64,) * 2 if exact else (torch.bfloat16, torch.float32)

    def bind(self, rank: int, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        assert not args, f"{name}: forks disagree on the order of parameters: by keyword"
        found = SIGNATURES[name].bind(**kwargs).arguments
        self.calls.append((rank, name, dict(found)))
        return found

    def of(self, rank: int) -> list[str]:
        """The calls of a rank in short: a dispatch with a handle is 'cached'."""
        short = []
        for by, name, given in self.calls:
            if by == rank and not name.endswith("__init__"):
                name = name.split(".")[1]
                short.append("cached" if name == "dispatch" and given.get("handle") is not None else name)
        return short

    def check_rows(self, x: Tensor, step: int = 1) -> None:
        assert x.dtype == self.rows and x.ndim == 2 and x.is_contiguous(), (x.dtype, x.stride())
        assert x.shape[1] * x.itemsize % (8 if self.exact else 32) == 0 and x.shape[1] % step == 0, x.shape
        both = torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
        assert not both, "check_torch_deterministic"


def moved(group: Any, rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
    """counts[r] of the rows to each rank r; the bytes of what comes, and how much from each."""
    theirs = torch.empty(len(counts), dtype=torch.int64)
    dist.all_to_all_single(theirs, torch.tensor(counts), group=group)
    sizes = theirs.tolist()
    sent = rows.contiguous().view(torch.uint8)
    out = torch.empty(sum(sizes), sent.shape[1], dtype=torch.uint8)
    dist.all_to_all_single(out, sent, sizes, counts, group=group)
    return out.view(rows.dtype), sizes


class Base:
    world: World

    def _begin(self, given: dict[str, Any]) -> None:
        self.group = given["group"]
        self.rank, self.R, self.alive = self.group.rank(), self.group.size(), True
        assert given["explicitly_destroy"], "a destructor that hangs"
        dist.barrier(group=self.group)

    def destroy(self, *args: Any, **kwargs: Any) -> None:
        self.world.bind(self.rank, f"{type(self).__name__}.destroy", args, kwargs)
        assert self.alive, "destroyed twice"
        dist.barrier(group=self.group)
        self.alive = False
        self.world.destroyed.append(self.rank)

    def _check_ids(self, ids: Tensor, E: int) -> None:
        assert ids.dtype == torch.int64 and ids.ndim == 2 and ids.is_contiguous() and E % self.R == 0
        assert len(ids) >= 1, "upstream never tests a rank without tokens"
        assert bool(((ids >= -1) & (ids < E)).all())

    def _out(self, ids: Tensor, E: int) -> tuple[Tensor, Tensor, list[int]]:
        """(tokens, ranks) that leave, by rank and then by token; and how many for each rank."""
        owner = torch.where(ids >= 0, ids // (E // self.R), -1)
        to = torch.stack([(owner == rank).any(1) for rank in range(self.R)])
        ranks, tokens = to.nonzero(as_tuple=True)
        return tokens, ranks, to.sum(1).tolist()

    def _localised(self, ids: Tensor, E: int) -> Tensor:
        local = ids - self.rank * (E // self.R)
        return torch.where((local >= 0) & (local < E // self.R) & (ids >= 0), local, -1)

    def _summed(self, x: Tensor, back: list[int], tokens: Tensor, sent: list[int], T: int, wide: Any) -> Tensor:
        """Each token's rows from all ranks, added up; NaN where there are none."""
        came, sizes = moved(self.group, x, back)
        assert sizes == sent
        out = torch.zeros(T, *x.shape[1:], dtype=wide).index_add(0, tokens, came.to(wide))
        alone = torch.ones(T, dtype=torch.bool).index_fill(0, tokens, False)
        return out.masked_fill(alone.view(T, *[1] * (x.ndim - 1)), torch.nan).to(x.dtype)

    def _check_weights(self, w: Tensor, n: int) -> None:
        assert w.dtype == self.world.weights and w.ndim == 2 and len(w) == n and w.is_contiguous()
