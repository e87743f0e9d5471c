"""Expert parallelism by all-to-all: each routed row goes to the rank that has its expert, and comes back.

    plan      sort this rank's slots by expert; one exchange of counts, with all that ranks must agree on
    dispatch  one all_to_all of the rows and their weights; sort what arrived by expert
    combine   one all_to_all the other way; this rank adds up the K rows of each of its tokens

Rows leave in the order of their experts, so those for one rank lie together. They arrive by source, and `order` sorts
them by expert, sources ascending: every sum has the order that it has on one device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmoe.dispatch.agree import agree, room
from fmoe.dispatch.context import Context
from fmoe.dispatch.local import Plan as Slots
from fmoe.dispatch.local import by_expert
from fmoe.dispatch.pair import Sizes, facts, pair, share, sizes, value
from fmoe.dispatch.rows import Dispatcher
from fmoe.dispatch.slots import packed, put, take, unpacked
from fmoe.types import MoEConfig, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@value("slot_ids", "order", "inverse", "counts")
@dataclass(frozen=True, eq=False)
class Plan:
    """Row n of this rank's experts is the order[n]-th to arrive; sent[r] rows go to rank r, received[r] come from it.

    slot_ids [sum of sent]: the slots that leave, in order. order [N], inverse [N]: order[inverse[i]] = i. counts
    [E / ranks], summing to N. All int64.
    """

    slot_ids: Tensor
    order: Tensor
    inverse: Tensor
    counts: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    sizes: Sizes

    @property
    def n_rows(self) -> int:
        return sum(self.received)

    @property
    def slots(self) -> Slots:
        return Slots(self.slot_ids, self.counts, self.sizes.T, self.sizes.K)


def all_to_all(group: "ProcessGroup | None" = None) -> Dispatcher:
    """The Dispatcher of a group of R ranks, each with E / R of the experts: rank r has [r E / R, (r + 1) E / R).

    With it `fmoe.experts` takes this rank's tokens (any number, also none), global expert ids, config.n_routed_experts
    = E and this rank's share of the parameters, and returns this rank's y. Sums have the order that they have on one
    device. The gradient of a parameter is the sum over the tokens of all ranks of the group (not a mean: divide by what
    your data parallelism expects); those of x and of the routing weights reach the rank that they came from.

    group: a torch.distributed group (None: the whole world), which stays its maker's. Every rank must make the same
    calls in the same order. Each row crosses once each way, in x's dtype with its weight, and back in fp32 (fp64 if x
    or the weights are); so it does in backward. A plan is one more exchange, of counts, and whoever recomputes keeps
    it: `experts(recompute=True)` does, and `d._replace(plan=lambda *_: plan)` is the dispatcher of a plan made outside
    of a torch.utils.checkpoint. Derivatives of any order in reverse mode; no forward mode and no vmap. torch.compile
    leaves its graph here (and raises with fullgraph=True).

    Raises RuntimeError where torch.distributed has not begun, once closed, and naming the step and the rank where a
    collective fails, after which the group is lost; ValueError for a process outside the group, for tensors that do not
    fit their plan, and on every rank, before any row moves, where ranks disagree or E % R is not 0.

    >>> import fmoe, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> routing = Routing(torch.tensor([[1], [0], [-1]]), torch.tensor([[0.5], [1.0], [1.0]]))
    >>> with all_to_all() as d:
    ...     fmoe.experts(params, torch.tensor([[3.0], [2.0], [9.0]]), routing, config, dispatcher=d).flatten().tolist()
    [45.0, 4.0, 0.0]
    >>> dist.destroy_process_group()
    """
    return pair(Context("all_to_all", group), Plan, _plan, _forth, _back)


def _plan(ctx: Context, routing: Routing, config: MoEConfig) -> Plan:
    E, R, width = config.n_routed_experts, ctx.size, room(ctx)
    slots = by_expert(routing.indices, routing.mask, E)
    # where E cannot be shared out, nobody's counts are read
    counts = slots.counts.view(R, -1) if E % R == 0 else slots.counts.new_zeros(R, 0)
    first = torch.nn.functional.pad(counts[:, :width], (0, max(width - counts.shape[1], 0)))
    theirs = agree(ctx, facts(routing, config), first)[:, : counts.shape[1]]
    n_mine = share(ctx, E)
    if n_mine > width:
        rest = ctx.all_to_all("plan", counts[:, width:], [1] * R, [1] * R)
        theirs = torch.cat([theirs, rest], 1)
    expert = torch.arange(n_mine, device=theirs.device).repeat(R).repeat_interleave(theirs.flatten())
    order = expert.argsort(stable=True)
    sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()
    return Plan(
        slot_ids=slots.slot_ids,
        order=order,
        inverse=order.argsort(),
        counts=theirs.sum(0),
        sent=tuple(sent),
        received=tuple(received),
        sizes=sizes(routing, config),
    )


def _forth(ctx: Context, step: str, x: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    arrived = ctx.all_to_all(step, packed(*take(x, w, plan.slots)), plan.sent, plan.received)
    return unpacked(arrived.index_select(0, plan.order), x.dtype, w.dtype, w.shape[2])


def _back(ctx: Context, step: str, rows: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    arrived = ctx.all_to_all(step, packed(rows, w).index_select(0, plan.inverse), plan.received, plan.sent)
    return put(*unpacked(arrived, rows.dtype, w.dtype, w.shape[1]), plan.slots)
