"""Expert parallelism by all-gather: every rank sees every token, multiplies those of its experts, and sums are shared.

    plan      tell each other how many tokens there are and where they go; sort what goes to this rank's experts
    dispatch  one all_gather of the tokens and their weights
    combine   add up this rank's rows of each token, then one reduce-scatter over the ranks

Cost grows with the number of ranks, not with K: the better of the two where a token goes to most ranks anyway.
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


@value("slot_ids", "counts")
@dataclass(frozen=True, eq=False)
class Plan:
    """Row n is slot slot_ids[n] of all tokens, which lie by rank, lengths[r] of rank r.

    slot_ids [N], counts [E / ranks] int64, summing to N.
    """

    slot_ids: Tensor
    counts: Tensor
    lengths: tuple[int, ...]
    sizes: Sizes

    @property
    def n_rows(self) -> int:
        return len(self.slot_ids)

    @property
    def slots(self) -> Slots:
        return Slots(self.slot_ids, self.counts, sum(self.lengths), self.sizes.K)


def all_gather(group: "ProcessGroup | None" = None) -> Dispatcher:
    """The Dispatcher of a group of R ranks, each with E / R of the experts: as `all_to_all`, by other collectives.

    Every rank receives all tokens: T D numbers from each rank in x's dtype, with T K weights, padded to the longest T
    of any rank (gloo has no all_gather of unequal lengths); as many leave it as partial sums, in fp32 (fp64 if x or the
    weights are), each to the rank of its token alone. A plan is two exchanges. Sums run over the slots of a token on
    each rank and then over ranks, ascending: one order, but not that of one device.

    Raises what `all_to_all` raises.

    >>> import fmoe, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> routing = Routing(torch.tensor([[1], [0], [-1]]), torch.tensor([[0.5], [1.0], [1.0]]))
    >>> with all_gather() as d:
    ...     fmoe.experts(params, torch.tensor([[3.0], [2.0], [9.0]]), routing, config, dispatcher=d).flatten().tolist()
    [45.0, 4.0, 0.0]
    >>> dist.destroy_process_group()
    """
    return pair(Context("all_gather", group), Plan, _plan, _forth, _back)


def _plan(ctx: Context, routing: Routing, config: MoEConfig) -> Plan:
    indices, mask = routing.indices.long(), routing.mask
    told = torch.full((ctx.size, room(ctx)), len(indices), dtype=torch.int64, device=indices.device)
    lengths = tuple(agree(ctx, facts(routing, config), told)[:, 0].tolist())
    n_mine = share(ctx, config.n_routed_experts)
    goes = (indices >= 0) & (indices < config.n_routed_experts)
    goes = goes if mask is None else goes & mask[:, None]
    everyone = ctx.all_gather("plan", indices.masked_fill(~goes, -1).int(), lengths)
    # counted from this rank's first expert: what is another's, or nobody's, is outside its range
    mine = by_expert(everyone - ctx.rank * n_mine, None, n_mine)
    return Plan(slot_ids=mine.slot_ids, counts=mine.counts, lengths=lengths, sizes=sizes(routing, config))


def _forth(ctx: Context, step: str, x: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    J = w.shape[2]
    everyone = ctx.all_gather(step, packed(x, w.flatten(1)), plan.lengths)
    tokens, weights = unpacked(everyone, x.dtype, w.dtype, plan.sizes.K * J)
    return take(tokens, weights.unflatten(1, (plan.sizes.K, J)), plan.slots)


def _back(ctx: Context, step: str, rows: Tensor, w: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    parts = [part.flatten(1) for part in put(rows, w, plan.slots)]
    sums = ctx.reduce_scatter(step, torch.cat(parts, 1), plan.lengths)
    y, weights = sums.split([part.shape[1] for part in parts], 1)
    return y, weights.unflatten(1, (plan.sizes.K, w.shape[1]))
