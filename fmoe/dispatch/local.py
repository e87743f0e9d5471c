"""The dispatcher of one device: nothing moves, rows are sorted by expert.

Both directions go through the T * K slots of the routing. A slot holds one row or none, so no two rows are ever added
by a scatter: sums run over the K slots of a token, in one order, in fp32, forward and backward.
"""

from typing import NamedTuple

import torch
from fmoe_kernels import reference
from torch import Tensor

from fmoe.dispatch import Dispatcher, Rows
from fmoe.types import MoEConfig, Routing


class Plan(NamedTuple):
    """Row n is slot slot_ids[n] = t * K + k; counts[e] rows for expert e. slot_ids [N], counts [E] int64."""

    slot_ids: Tensor
    counts: Tensor
    n_tokens: int
    k: int


def plan(routing: Routing, config: MoEConfig) -> Plan:
    """The slots that go anywhere, sorted by expert and otherwise in order.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=2, dim=1, moe_inter_dim=1)
    >>> plan(Routing(torch.tensor([[1, 0], [1, -1]]), torch.ones(2, 2)), config)
    Plan(slot_ids=tensor([1, 0, 2]), counts=tensor([1, 2]), n_tokens=2, k=2)
    """
    n_tokens, k = routing.indices.shape
    routed = reference.route(routing.indices, routing.weights.detach(), routing.mask, config.n_routed_experts)
    return Plan(routed.slot_ids, routed.counts, n_tokens, k)


def dispatch(x: Tensor, weights: Tensor, plan: Plan) -> Rows:
    """Rows(x[t], weights[t, k]) for every slot (t, k) of the plan; x [T, D], weights [T, K].

    >>> plan = Plan(slot_ids=torch.tensor([1, 0, 2]), counts=torch.tensor([1, 2]), n_tokens=2, k=2)
    >>> rows = dispatch(torch.tensor([[1.0], [2.0]]), torch.ones(2, 2), plan)
    >>> rows.x.flatten().tolist()
    [1.0, 1.0, 2.0]
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    # the transpose of `expand` is one sum over k, rounded once; that of x[token_ids] is a scatter, in any order
    copies = x[:, None].expand(-1, plan.k, -1).flatten(0, 1)
    sent = weights.flatten().index_select(0, plan.slot_ids).to(wide)
    return Rows(copies.index_select(0, plan.slot_ids), sent, plan.counts)


def combine(rows: Tensor, plan: Plan) -> Tensor:
    """y[t] = sum of rows[n] over the rows n of token t, in fp32 (fp64 stays), k ascending.

    >>> plan = Plan(slot_ids=torch.tensor([1, 0, 2]), counts=torch.tensor([1, 2]), n_tokens=2, k=2)
    >>> combine(torch.tensor([[1.0], [1.0], [2.0]]), plan).flatten().tolist()
    [2.0, 2.0]
    """
    slots = rows.new_zeros(plan.n_tokens * plan.k, rows.shape[1]).index_copy(0, plan.slot_ids, rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return slots.unflatten(0, (plan.n_tokens, plan.k)).sum(1, dtype=wide)


local = Dispatcher(plan, dispatch, combine)
