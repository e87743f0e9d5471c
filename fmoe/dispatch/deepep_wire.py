"""DeepEP's buffer as `deepep` uses it: what both generations take, refuse and give back, in one form."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmoe.dispatch.context import Context
from fmoe.dispatch.pair import value
from fmoe.types import MoEConfig, Routing

ROWS, WEIGHTS = torch.bfloat16, torch.float32  # what DeepEP carries and adds up
V1_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # those it has a configuration for
WIDTHS = {"buffer": 16, "elastic": 256}  # of rows that are added up: what D must be a multiple of
INSTALL = "build it from github.com/deepseek-ai/DeepEP, or `pip install sgl-deep-ep` (the package deep_ep is another)"


def columns(D: int, K: int) -> int:
    """How many numbers a row of D and the bits of its K weights take: 32 bytes at a time, for Hopper's copies."""
    return -(-(D * ROWS.itemsize + K * WEIGHTS.itemsize) // 32) * 32 // ROWS.itemsize


@value("tensors")
@dataclass(frozen=True, eq=False)
class Handle:
    """What DeepEP calls a handle, taken apart: its tensors are leaves, all else is static. `whole` puts it together."""

    tensors: dict[Any, Tensor]
    rest: dict[Any, Any]
    kind: Any

    @staticmethod
    def of(handle: Any) -> "Handle":
        items = dict(enumerate(handle)) if isinstance(handle, tuple) else dict(vars(handle))
        tensors = {name: item for name, item in items.items() if isinstance(item, Tensor)}
        return Handle(tensors, {name: item for name, item in items.items() if name not in tensors}, type(handle))

    def whole(self) -> Any:
        items = self.tensors | self.rest
        if self.kind is tuple:
            return tuple(items[i] for i in sorted(items))
        made = self.kind.__new__(self.kind)
        vars(made).update(items)
        return made


class Wire(Context):
    """One rank's place in a group, and the buffer that belongs to it."""

    def __init__(
        self, group: Any, config: MoEConfig, max_tokens: int, api: str | None, options: dict[str, Any]
    ) -> None:
        super().__init__("deepep", group)
        self.config, self.max_tokens = config, max_tokens
        self.buffer: Any = None
        problem: Exception | None = None
        try:
            library = deep_ep()
            self.api = choose(library, api)
            self._check_layer()
        except (ImportError, ValueError) as error:
            problem = error
        plain = {name: o if isinstance(o, int | str | None) else type(o).__name__ for name, o in options.items()}
        self._agree(problem, library=None if problem else self.api, options=str(sorted(plain.items())))
        width = columns(config.expert_dim, config.n_activated_experts)
        given: dict[str, Any] = dict(group=self.group or dist.group.WORLD, explicitly_destroy=True)
        if self.api == "elastic":
            K = config.n_activated_experts
            given |= dict(num_max_tokens_per_rank=max_tokens, hidden=width, num_topk=K)
            self.buffer = self.call("making the buffer", library.ElasticBuffer, **given | options)
        else:
            given |= self.call(
                "sizing the buffer", _sizes, kind=library.Buffer, R=self.size, nbytes=width * ROWS.itemsize
            )
            self.buffer = self.call("making the buffer", library.Buffer, **given | options)
        self.ids = getattr(library, "topk_idx_t", torch.int64)

    def _agree(self, problem: Exception | None, **facts: Any) -> None:
        """Raises on every rank where one has a problem, or all do not say the same: nobody is left waiting."""
        c = self.config
        facts |= dict(E=c.n_routed_experts, K=c.n_activated_experts, D=c.expert_dim, max_tokens=self.max_tokens)
        heard: list[Any] = [None] * self.size
        dist.all_gather_object(heard, (None if problem is None else str(problem), facts), group=self.group)
        if problem is not None:
            raise problem
        if failed := [f"rank {rank}: {said}" for rank, (said, _) in enumerate(heard) if said is not None]:
            raise RuntimeError(f"deepep: it cannot be made on {failed[0]}")
        told = {name: [theirs[name] for _, theirs in heard] for name in facts}
        if wrong := [f"{name}: {by_rank}" for name, by_rank in told.items() if len(set(by_rank)) > 1]:
            raise ValueError(f"deepep: the ranks disagree, by rank, on {', and on '.join(wrong)}")

    def _check_layer(self) -> None:
        c, R, step = self.config, self.size, WIDTHS[self.api]
        kind = {"elastic": "V2 (ElasticBuffer)", "buffer": "V1 (Buffer)"}[self.api]
        wrong = []
        if self.api == "buffer" and R not in V1_RANKS:
            wrong.append(f"{R} ranks, expected one of {', '.join(map(str, V1_RANKS))}")
        if c.n_routed_experts % R:
            wrong.append(f"{c.n_routed_experts} experts on {R} ranks, expected E % ranks == 0")
        if c.expert_dim % step:
            wrong.append(f"rows of D={c.expert_dim}, expected a multiple of {step}")
        if self.api == "elastic" and c.n_activated_experts > 32:
            wrong.append(f"K={c.n_activated_experts}, expected at most 32")
        if c.dtype != ROWS:
            wrong.append(f"config.dtype {c.dtype}, expected {ROWS}: it adds up nothing else")
        if wrong:
            raise ValueError(f"deepep: {kind} cannot take " + ", nor ".join(wrong) + "; all_to_all takes any")

    def check(self, step: str) -> None:
        """Raises RuntimeError once closed, after a failure, and in the one mode of torch that DeepEP refuses."""
        super().check(step)
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        if filled and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                f"deepep: {step}: DeepEP refuses torch.use_deterministic_algorithms(True) while "
                "torch.utils.deterministic.fill_uninitialized_memory is on: set that to False"
            )

    def check_plan(self, ids: Tensor, routing: Routing, config: MoEConfig) -> None:
        """Raises ValueError, on this rank, for what the buffer was not made for. ids [T, K], -1: nowhere."""
        (T, K), made = ids.shape, self.config
        facts = {"E": config.n_routed_experts, "D": config.expert_dim, "dtype of x": config.dtype}
        of = {"E": made.n_routed_experts, "D": made.expert_dim, "dtype of x": made.dtype}
        wrong = [f"{name} is {facts[name]}, expected {of[name]}" for name in facts if facts[name] != of[name]]
        if T > self.max_tokens:
            wrong.append(f"T is {T}, expected at most max_tokens={self.max_tokens}")
        if K > made.n_activated_experts:
            wrong.append(f"K is {K}, expected at most {made.n_activated_experts}")
        if torch.promote_types(routing.weights.dtype, WEIGHTS) != WEIGHTS:
            wrong.append(f"weights are {routing.weights.dtype}, expected {WEIGHTS} or narrower")
        if self.api == "elastic" and K > 1:
            ranked = ids.sort(1).values
            if bool(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any()):
                wrong.append("a token names an expert twice, which V2 (ElasticBuffer) does not take")
        if wrong:
            raise ValueError(f"deepep: plan: {'; '.join(wrong)} (of what it was made for)")

    def first(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Handle]:
        """(rows that arrived [n, ..], the ids of their experts among this rank's [n, K] or -1, the handle)."""
        rows, ids = _some(rows, 0), _some(ids, -1).to(self.ids)
        E, weights = self.config.n_routed_experts, torch.zeros(ids.shape, dtype=WEIGHTS, device=ids.device)
        how: dict[str, Any] = dict(x=rows, topk_idx=ids, topk_weights=weights)
        if self.api == "elastic":
            out = self.call("plan", self.buffer.dispatch, **how, num_experts=E, do_cpu_sync=True)
            arrived, local, _, handle, _ = out
        else:
            layout = self.call("plan", self.buffer.get_dispatch_layout, topk_idx=ids, num_experts=E)
            per_rank, per_rdma_rank, per_expert, in_rank, _ = layout
            how |= dict(num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank)
            how |= dict(num_tokens_per_expert=per_expert, is_token_in_rank=in_rank)
            arrived, local, _, _, handle, _ = self.call("plan", self.buffer.dispatch, **how)
        return arrived, local.long(), Handle.of(handle)

    def dispatch(self, step: str, rows: Tensor, handle: Handle) -> Tensor:
        """The rows that arrive, in the order of the handle's first dispatch."""
        how: dict[str, Any] = dict(x=_some(rows, 0).contiguous(), handle=handle.whole())
        if self.api == "elastic":
            how |= dict(num_sms=how["handle"].num_sms)  # else it is computed from what a cached call does not give
        arrived: Tensor = self.call(step, self.buffer.dispatch, **how)[0]
        return arrived

    def combine(
        self, step: str, rows: Tensor, weights: Tensor | None, handle: Handle, T: int
    ) -> tuple[Tensor, Tensor | None]:
        """(the sum over ranks of each token's rows [T, D], that of the weights [T, K])."""
        how = dict(x=rows.contiguous(), handle=handle.whole(), topk_weights=weights)
        y, w, _ = self.call(step, self.buffer.combine, **how)
        return y[:T], None if weights is None else w[:T]

    def call(self, step: str, f: Any, **how: Any) -> Any:
        self.check(step)
        try:
            return f(**how)
        except Exception as error:
            self._unusable = f"an earlier call failed on rank {self.rank}: make a new group"
            raise RuntimeError(
                f"deepep: {step}: failed on rank {self.rank} of {self.size}: {type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Frees the buffer, on all ranks together; not after a failure, since freeing waits for the others."""
        whole, buffer, self.buffer = not self._unusable, self.buffer, None
        super().close()
        if whole and buffer is not None:
            buffer.destroy()


def _some(t: Tensor, fill: int) -> Tensor:
    """t, or one row in place of none: DeepEP's own tests have no rank without tokens."""
    return t if len(t) else t.new_full((1, *t.shape[1:]), fill)


def _sizes(kind: Any, R: int, nbytes: int) -> dict[str, int]:
    configs = [kind.get_dispatch_config(R), kind.get_combine_config(R)]
    sizes = dict(num_nvl_bytes=max(config.get_nvl_buffer_size_hint(nbytes, R) for config in configs))
    if R > 8:  # a build without NVSHMEM has no answer
        sizes |= dict(num_rdma_bytes=max(config.get_rdma_buffer_size_hint(nbytes, R) for config in configs))
    return sizes


def deep_ep() -> Any:
    """The module deep_ep. Raises ImportError, with the reason, whatever it was."""
    try:
        return import_module("deep_ep")
    except Exception as error:  # AssertionError of an NCCL check, OSError of libcuda: it fails in every way
        raise ImportError(
            f"deepep cannot run here: {type(error).__name__}: {error}; {INSTALL}, or all_to_all"
        ) from error


def choose(library: Any, api: str | None) -> str:
    """'elastic' or 'buffer', by what the module has, not by its version: three packages bear its name."""
    if api == "hybrid":
        told = "it drops rows that do not fit and wants as many tokens on every rank; 'buffer' is in the same package"
        raise ValueError(f"deepep: api is 'hybrid' (HybridEPBuffer), which is not supported: {told}")
    has = [name for name, kind in (("elastic", "ElasticBuffer"), ("buffer", "Buffer")) if hasattr(library, kind)]
    if api not in (None, "elastic", "buffer"):
        raise ValueError(f"deepep: api is {api!r}, expected 'elastic' (V2), 'buffer' (V1) or None")
    if not has or api not in (None, *has):
        where = getattr(library, "__file__", library)
        raise ImportError(f"deepep: {where} has {' and '.join(has) or 'neither Buffer nor ElasticBuffer'}; {INSTALL}")
    return api or has[0]
