"""Expert parallelism by DeepEP: its kernels carry each token once to every rank that has an expert of it, and back.

    plan      one dispatch of narrow rows that say where they come from: DeepEP's layout, kept as its cached handle
    dispatch  one cached dispatch of rows with their weights as bits; then a row for each (token, expert of this rank)
    combine   add up this rank's rows of each token, then DeepEP's combine over ranks

A plan is a value that holds the handle, so recomputation asks for no layout and waits for nothing. Both generations
are called by keyword and synchronously with the current stream: `Buffer` (V1, also of the branch hybrid-ep) and
`ElasticBuffer` (V2).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmoe.dispatch import deepep_wire as wires
from fmoe.dispatch.context import Context
from fmoe.dispatch.deepep_wire import Handle, Wire, columns
from fmoe.dispatch.local import by_expert, local
from fmoe.dispatch.pair import Sizes, pair, sizes, value
from fmoe.dispatch.rows import Dispatcher
from fmoe.dispatch.slots import packed, unpacked
from fmoe.types import MoEConfig, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@value("slot_ids", "places", "counts", "goes", "handle")
@dataclass(frozen=True, eq=False)
class Plan:
    """Row n of this rank's experts is slot slot_ids[n] = i * K + k of what arrives, i the i-th row that does.

    places [N]: i * most + j for the j-th such slot of row i; most: how many a row has at most. counts [E / ranks],
    summing to N. goes [T, K] bool: which slots of this rank's own tokens go anywhere. handle: DeepEP's.
    """

    slot_ids: Tensor
    places: Tensor
    counts: Tensor
    goes: Tensor
    handle: Handle
    n_arrived: int
    most: int
    sizes: Sizes

    @property
    def n_rows(self) -> int:
        return len(self.slot_ids)


def deepep(
    group: "ProcessGroup | None",
    config: MoEConfig,
    *,
    max_tokens: int = 8192,
    api: str | None = None,
    **options: Any,
) -> Dispatcher:
    """The Dispatcher of a group of R ranks, each with E / R of the experts, over DeepEP's buffers: made on all ranks
    at once, for layers of this config, and closed by `with` or `close()`, which frees the buffer.

        with fmoe.dispatch.deepep(group, config, max_tokens=4096) as d:
            y = fmoe.experts(mine, x, routing, config, dispatcher=d)

    config: its E, D and dtype are those of every plan; its K, and max_tokens, the T of any rank, are upper bounds. api:
    "elastic" (V2), "buffer" (V1), or None: the first of these that is installed. options go to its constructor, such as
    `allow_multiple_reduction=False` or `num_nvl_bytes=...`. A group of one rank needs no DeepEP: it gets `local`.

    Rows cross in bf16, weights and their gradients in fp32. Sums over a rank's experts are fp32 and rounded to bf16
    once per rank; those over ranks are DeepEP's, rounded to bf16. Rows are sorted by expert, rank and token whatever
    order they arrive in. What is true of `all_to_all` of gradients, torch.compile and vmap is true here.

    Raises ImportError, with the reason, without DeepEP; ValueError, before any row moves, where ranks disagree, or for
    what DeepEP would refuse with an assertion or a hang: x other than bf16, widths, numbers of ranks and experts, more
    than max_tokens, and (V2) an expert that a token names twice; RuntimeError as `all_to_all`.

    Source: DeepEP 2.1.0, deep_ep/buffers/elastic.py and legacy.py (deepseek-ai/DeepEP).

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1)
    >>> deepep(None, config) is local
    True
    >>> dist.destroy_process_group()
    """
    if Context("deepep", group).size == 1:
        return local
    return pair(Wire(group, config, max_tokens, api, options), Plan, _plan, _forth, _back)


def _plan(wire: Wire, routing: Routing, config: MoEConfig) -> Plan:
    indices, mask = routing.indices.long(), routing.mask
    (T, K), E = indices.shape, config.n_routed_experts
    goes = (indices >= 0) & (indices < E)
    goes = goes if mask is None else goes & mask[:, None]
    ids = indices.masked_fill(~goes, -1)
    wire.check_plan(ids, routing, config)
    # where a row comes from: the order of one device, in which sums are repeatable, whatever the order of arrival
    source = torch.zeros(T, 4, dtype=torch.int64, device=ids.device)
    source[:, 0] = wire.rank * wire.max_tokens + torch.arange(T, device=ids.device)
    arrived, local_ids, handle = wire.first(_as_rows(source), ids)
    order = arrived.contiguous().view(torch.int64)[:, 0].argsort(stable=True)
    mine = by_expert(local_ids.index_select(0, order), None, E // wire.size)
    here = (local_ids >= 0).long()
    most = int(here.sum(1).max()) if here.numel() else 0
    slot_ids = order[mine.slot_ids // K] * K + mine.slot_ids % K
    places = (here.cumsum(1) - 1).flatten()[slot_ids] + slot_ids // K * most
    return Plan(slot_ids, places, mine.counts, goes, handle, len(order), most, sizes(routing, config))


def _as_rows(t: Tensor) -> Tensor:
    """Bytes as numbers of the dtype that DeepEP carries, which it copies and does not look at."""
    return t.contiguous().view(wires.ROWS)


def _forth(wire: Wire, step: str, x: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    K, D, J = plan.sizes.K, x.shape[1], w.shape[2]
    sent = x.to(wires.ROWS)
    if J:
        bits = packed(sent, w.flatten(1).to(wires.WEIGHTS))
        room = columns(D, K) * wires.ROWS.itemsize - bits.shape[1]
        sent = _as_rows(torch.nn.functional.pad(bits, (0, room)))
    arrived = wire.dispatch(step, sent, plan.handle)
    row = plan.slot_ids // K
    if not J:
        return arrived.index_select(0, row).to(x.dtype), w.new_empty(len(row), 0)
    size = D * wires.ROWS.itemsize + K * J * wires.WEIGHTS.itemsize
    rows, weights = unpacked(arrived.view(torch.uint8)[:, :size], wires.ROWS, wires.WEIGHTS, K * J)
    return rows.index_select(0, row).to(x.dtype), weights.view(-1, J).index_select(0, plan.slot_ids).to(w.dtype)


def _back(wire: Wire, step: str, rows: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    (T, K), J, n, wide = plan.goes.shape, w.shape[1], plan.n_arrived, plan.sizes.wide
    slots = rows.new_zeros(n * plan.most, rows.shape[1]).index_copy(0, plan.places, rows)
    partial = slots.view(n, plan.most, rows.shape[1]).sum(1, dtype=wide).to(wires.ROWS)
    dw = None
    if J:
        dw = w.new_zeros(n * K, J, dtype=wires.WEIGHTS).index_copy(0, plan.slot_ids, w.to(wires.WEIGHTS)).view(n, K)
    y, weights = wire.combine(step, partial, dw, plan.handle, T)
    # what DeepEP makes of tokens and slots that went nowhere is not said
    y = y.to(wide).masked_fill(~plan.goes.any(1, keepdim=True), 0)
    if weights is None:
        return y, w.new_empty(T, K, 0)
    return y, weights.to(w.dtype).masked_fill(~plan.goes, 0)[..., None]
