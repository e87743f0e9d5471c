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
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from deep_ep_world import EVENT, SIGNATURES, Base, World, moved

from fmoe.dispatch import deepep_wire as wires

V1_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


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
