"""A stand-in for DeepEP on a CPU that holds us to its contract: strict, and unkind where it may be.

Rows really travel, over the ranks of a process group, on processes or threads. What it insists on was read in the
source of DeepEP 2.1.0 (V1 `Buffer`, V2 `ElasticBuffer`); every call must bind to the signatures recorded from it. What
the contract leaves open is made the worst of: V2's rows arrive in any order, weights of slots of other ranks (V2), and
tokens and slots that went nowhere, are NaN. It shows that our side of the contract is right; it has no idea whether
DeepEP's kernels are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import published
import torch
import torch.distributed as dist
from torch import Tensor

from fmoe.dispatch import deepep_wire as wires

SIGNATURES = published.recorded()["sgl_deep_ep-0.1.2.post1"]
V1_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
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


def v1(world: World) -> dict[str, Any]:
    class Config:
        def __init__(self, ranks: int) -> None:
            assert ranks in V1_RANKS, f"Unsupported number of EP ranks: {ranks}"

        def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
            return hidden_bytes * num_ranks

        def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
            raise AssertionError("NVSHMEM is disable during compilation")

    class Buffer(Base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.world = world
            given = world.bind(kwargs["group"].rank(), "Buffer.__init__", args, kwargs)
            self._begin(given)
            assert self.R in V1_RANKS and given["num_nvl_bytes"] > 0
            self.hidden_bytes = given["num_nvl_bytes"] // self.R

        @staticmethod
        def get_dispatch_config(*args: Any, **kwargs: Any) -> Config:
            return Config(SIGNATURES["Buffer.get_dispatch_config"].bind(*args, **kwargs).arguments["num_ranks"])

        get_combine_config = get_dispatch_config

        def get_dispatch_layout(self, *args: Any, **kwargs: Any) -> Any:
            given = world.bind(self.rank, "Buffer.get_dispatch_layout", args, kwargs)
            ids, E = given["topk_idx"], given["num_experts"]
            self._check_ids(ids, E)
            tokens, ranks, counts = self._out(ids, E)
            in_rank = torch.zeros(len(ids), self.R, dtype=torch.bool)
            in_rank[tokens, ranks] = True
            self.layout, self.E = (ids, in_rank), E
            per_expert = ids[ids >= 0].bincount(minlength=E).int()
            return torch.tensor(counts).int(), None, per_expert, in_rank, EVENT

        def dispatch(self, *args: Any, **kwargs: Any) -> Any:
            given = world.bind(self.rank, "Buffer.dispatch", args, kwargs)
            x, handle = given["x"], given.get("handle")
            assert self.alive and x.shape[1] * x.itemsize <= self.hidden_bytes, "the buffer is too small"
            world.check_rows(x)
            layout = ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")
            if handle is not None:
                assert not any(given.get(name) is not None for name in ("topk_idx", "topk_weights", *layout))
                assert type(handle) is tuple and len(handle) == 6 and all(t.device == x.device for t in handle)
                in_rank = handle[4]
            else:
                assert all(given[name] is not None for name in layout)
                ids, w, in_rank = given["topk_idx"], given["topk_weights"], given["is_token_in_rank"]
                assert ids is self.layout[0] and in_rank is self.layout[1], "a layout of other tokens"
                self._check_weights(w, len(ids))
            assert len(x) == len(in_rank)
            ranks, tokens = in_rank.T.nonzero(as_tuple=True)
            sent = in_rank.sum(0).tolist()
            came, sizes = moved(self.group, x[tokens], sent)
            if handle is not None:
                assert handle[0][self.rank].tolist() == sizes, "a handle of another dispatch"
                return came, None, None, None, None, EVENT
            local = self._localised(moved(self.group, ids[tokens], sent)[0], self.E)
            weights = moved(self.group, w[tokens], sent)[0].masked_fill(local < 0, 0)
            source = moved(self.group, tokens.int()[:, None], sent)[0][:, 0]
            matrix = torch.full((self.R, self.R), -1, dtype=torch.int32)
            matrix[self.rank] = torch.tensor(sizes)
            handle = (matrix, torch.tensor(sent).int(), torch.zeros(1).int(), source, in_rank, tokens.int())
            per_expert = local[local >= 0].bincount(minlength=self.E // self.R).tolist()
            return came, local, weights, per_expert, handle, EVENT

        def combine(self, *args: Any, **kwargs: Any) -> Any:
            given = world.bind(self.rank, "Buffer.combine", args, kwargs)
            x, handle, w = given["x"], given["handle"], given.get("topk_weights")
            assert self.alive and len(x) == len(handle[3]), "rows of another dispatch"
            world.check_rows(x, step=1)
            T, tokens, back, sent = len(handle[4]), handle[5].long(), handle[0][self.rank].tolist(), handle[1].tolist()
            wide = torch.promote_types(x.dtype, torch.float32)
            y = self._summed(x, back, tokens, sent, T, wide)
            if w is not None:
                self._check_weights(w, len(x))
                w = self._summed(w, back, tokens, sent, T, w.dtype)
            return y, w, EVENT

    return {"Buffer": Buffer, "Config": Config}


def v2(world: World) -> dict[str, Any]:
    class EPHandle:
        def __init__(self, **held: Any) -> None:
            vars(self).update(held)

    class ElasticBuffer(Base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.world = world
            given = world.bind(kwargs["group"].rank(), "ElasticBuffer.__init__", args, kwargs)
            self._begin(given)
            self.most, self.hidden, self.K = given["num_max_tokens_per_rank"], given["hidden"], given["num_topk"]
            everyone: list[Any] = [None] * self.R
            dist.all_gather_object(everyone, (self.most, self.hidden, self.K), group=self.group)
            assert len(set(everyone)) == 1 and 0 < self.K <= 32

        def dispatch(self, *args: Any, **kwargs: Any) -> Any:
            given = world.bind(self.rank, "ElasticBuffer.dispatch", args, kwargs)
            x, handle, E = given["x"], given.get("handle"), given.get("num_experts")
            assert self.alive and x.shape[1] <= self.hidden, "the buffer is too small"
            world.check_rows(x)
            if handle is not None:
                assert given.get("topk_idx") is None and given.get("topk_weights") is None
                assert not given.get("do_cpu_sync") and given.get("num_sms") == handle.num_sms
                ids, E = handle.topk_idx, handle.num_experts
            else:
                ids, w = given["topk_idx"], given["topk_weights"]
                self._check_ids(ids, E)
                self._check_weights(w, len(ids))
                assert ids.shape[1] <= self.K and given.get("do_cpu_sync") is not False, "sizes would be the worst case"
                for chosen in ids.tolist():
                    real = [e for e in chosen if e >= 0]
                    assert len(real) == len(set(real)), "a device assertion: an expert twice"
            assert len(x) == len(ids) <= self.most
            tokens, _, sent = self._out(ids, E)
            came, sizes = moved(self.group, x[tokens], sent)
            source = moved(self.group, (tokens + self.rank * self.most).int()[:, None], sent)[0][:, 0]
            if handle is not None:
                assert handle.num_recv_tokens == len(came) and isinstance(handle.num_recv_tokens_per_expert_list, list)
                at = {int(s): i for i, s in enumerate(source)}
                order = torch.tensor([at[int(s)] for s in handle.recv_src_metadata[:, 0]], dtype=torch.int64)
                return came[order], None, None, handle, EVENT
            world.handles += 1
            shuffle = torch.Generator().manual_seed(world.handles + 100 * self.rank)
            order = torch.randperm(len(came), generator=shuffle)
            local = self._localised(moved(self.group, ids[tokens], sent)[0], E)[order]
            weights = moved(self.group, w[tokens], sent)[0][order].masked_fill(local < 0, torch.nan)
            handle = EPHandle(
                do_expand=False, num_experts=E, expert_alignment=1, num_max_tokens_per_rank=self.most, num_sms=24,
                topk_idx=ids.clone(), num_recv_tokens=len(came), num_expanded_tokens=0,
                num_recv_tokens_per_expert_list=local[local >= 0].bincount(minlength=E // self.R).tolist(),
                recv_src_metadata=torch.stack([source[order], order.int()], 1), channel_linked_list=None,
                psum_num_recv_tokens_per_scaleup_rank=torch.tensor(sizes).cumsum(0).int(),
                cached_recv_src_metadata_before_sort=None,
            )  # fmt: skip
            return came[order], local, weights, handle, EVENT

        def combine(self, *args: Any, **kwargs: Any) -> Any:
            given = world.bind(self.rank, "ElasticBuffer.combine", args, kwargs)
            x, handle, w = given["x"], given["handle"], given.get("topk_weights")
            assert self.alive and type(handle) is EPHandle and len(x) == handle.num_recv_tokens
            world.check_rows(x, step=1 if world.exact else 256)
            ids = handle.topk_idx
            tokens, _, sent = self._out(ids, handle.num_experts)
            back = torch.diff(handle.psum_num_recv_tokens_per_scaleup_rank, prepend=torch.zeros(1).int()).tolist()
            # to the order in which they came: by rank and then by token
            home = handle.recv_src_metadata[:, 1].long().argsort()
            wide = torch.promote_types(x.dtype, torch.float32)
            y = self._summed(x[home], back, tokens, sent, len(ids), wide)
            if w is not None:
                self._check_weights(w, len(x))
                w = self._summed(w[home], back, tokens, sent, len(ids), w.dtype).masked_fill(ids < 0, torch.nan)
            return y, w, EVENT

    return {"ElasticBuffer": ElasticBuffer, "EPHandle": EPHandle}


@contextmanager
def installed(*kinds: str, exact: bool = False) -> Iterator[World]:
    """deep_ep with "buffer" (V1), "elastic" (V2) or both can be imported, until the end.

    exact: with rows and weights in fp64, of any width, here and there, so that parity can be asked to 1e-12.
    """
    world, library = World(exact), ModuleType("deep_ep")
    library.topk_idx_t = torch.int64  # type: ignore[attr-defined]
    for kind in kinds:
        vars(library).update({"buffer": v1, "elastic": v2}[kind](world))
    before = wires.ROWS, wires.WEIGHTS, wires.WIDTHS
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if exact:
        wires.ROWS = wires.WEIGHTS = torch.float64
        wires.WIDTHS = {"buffer": 1, "elastic": 1}
    torch.utils.deterministic.fill_uninitialized_memory = False  # DeepEP refuses it, and so does this
    sys.modules["deep_ep"] = library
    try:
        yield world
    finally:
        del sys.modules["deep_ep"]
        wires.ROWS, wires.WEIGHTS, wires.WIDTHS = before
        torch.utils.deterministic.fill_uninitialized_memory = filled
