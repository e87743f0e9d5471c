"""The dispatcher of one device: nothing moves, rows are sorted by expert.

Both directions go through the T * K slots of the routing. A slot holds one row or none, so no two rows are ever added
by a scatter: sums run over the K slots of a token, in one order, in fp32, forward and backward.

Where the host can read the routing, there is a row for each slot that goes somewhere. Where it cannot (under
torch.compile, export, and a vmap over routings), or would have to wait for a device, there is a row for every slot, and
those that go nowhere come last.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fmoe.dispatch.moves import gather, spread, summed
from fmoe.dispatch.rows import Dispatcher, Rows
from fmoe.dispatch.watched import untraced, unwatched
from fmoe.types import MoEConfig, Routing


class Plan(NamedTuple):
    """Row n is slot slot_ids[n] = t * K + k; counts[e] rows for expert e. slot_ids [N], counts [E] int64.

    routed [N, 1] bool: which rows go anywhere; None: all do, and N is the sum of counts.
    """

    slot_ids: Tensor
    counts: Tensor
    n_tokens: int
    k: int
    routed: Tensor | None = None


def plan(routing: Routing, config: MoEConfig) -> Plan:
    """The slots that go anywhere, sorted by expert and otherwise in order.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=2, dim=1, moe_inter_dim=1)
    >>> plan(Routing(torch.tensor([[1, 0], [1, -1]]), torch.ones(2, 2)), config)
    Plan(slot_ids=tensor([1, 0, 2]), counts=tensor([1, 2]), n_tokens=2, k=2, routed=None)
    """
    untraced("local: plan")
    wait = routing.indices.device.type == "cpu"
    return by_expert(routing.indices, routing.mask, config.n_routed_experts, wait=wait)


def by_expert(indices: Tensor, mask: Tensor | None, E: int, wait: bool = True) -> Plan:
    """The plan of indices [T, K] and a mask [T], for experts [0, E). wait: for the device, to know how many rows."""
    T, K = indices.shape
    indices = indices.long()  # a narrow dtype may not hold E
    if wait and mask is None and not torch.compiler.is_compiling() and indices.numel() and unwatched(indices):
        ids, slot_ids = indices.flatten().sort(stable=True)
        if 0 <= int(ids[0]) and int(ids[-1]) < E:  # all slots go somewhere: the rest below in fewer steps
            return Plan(slot_ids, torch.bincount(ids, minlength=E), T, K)
    goes = (indices >= 0) & (indices < E)
    goes = goes if mask is None else goes & mask[:, None]
    ids, slot_ids = indices.masked_fill(~goes, E).flatten().sort(stable=True)
    # integers: whatever the order they are added in, the sum is the same
    counts = ids.new_zeros(E + 1).scatter_add(0, ids, torch.ones_like(ids))
    n_routed = _on_host(counts[:E].sum()) if wait else None
    if n_routed is None:
        return Plan(slot_ids, counts[:E], T, K, routed=(ids < E)[:, None])
    return Plan(slot_ids[:n_routed], counts[:E], T, K)


def dispatch(x: Tensor, weights: Tensor, plan: Plan) -> Rows:
    """Rows(x[t], weights[t, k]) for every slot (t, k) of the plan; x [T, D], weights [T, K].

    >>> plan = Plan(slot_ids=torch.tensor([1, 0, 2]), counts=torch.tensor([1, 2]), n_tokens=2, k=2)
    >>> rows = dispatch(torch.tensor([[1.0], [2.0]]), torch.ones(2, 2), plan)
    >>> rows.x.flatten().tolist()
    [1.0, 1.0, 2.0]
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    if _everywhere(plan):
        return Rows(
            spread(x, plan.slot_ids, plan.k), weights.flatten().index_select(0, plan.slot_ids).to(wide), plan.counts
        )
    # the transpose of `expand` is one sum over k, rounded once; that of x[token_ids] is a scatter, in any order
    copies, sent, ids = x[:, None].expand(-1, plan.k, -1).flatten(0, 1), weights.flatten().to(wide), plan.slot_ids
    if plan.routed is None:  # this alone has a gradient in batches; that, one for each of no routings
        return Rows(copies.index_select(0, ids), sent.index_select(0, ids), plan.counts)
    return Rows(_only(copies[ids], plan.routed), _only(sent[ids], plan.routed[:, 0]), plan.counts)


def combine(rows: Tensor, plan: Plan) -> Tensor:
    """y[t] = sum of rows[n] over the rows n of token t, in fp32 (fp64 stays), k ascending.

    >>> plan = Plan(slot_ids=torch.tensor([1, 0, 2]), counts=torch.tensor([1, 2]), n_tokens=2, k=2)
    >>> combine(torch.tensor([[1.0], [1.0], [2.0]]), plan).flatten().tolist()
    [2.0, 2.0]
    """
    if _everywhere(plan):
        return gather(rows, plan.slot_ids, plan.k)
    rows = rows if plan.routed is None else _only(rows, plan.routed)
    slots = rows.new_zeros(plan.n_tokens * plan.k, rows.shape[1]).index_copy(0, plan.slot_ids, rows)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return summed(slots.unflatten(0, (plan.n_tokens, plan.k)), wide)


def _everywhere(plan: Plan) -> bool:
    """Does every slot go somewhere, and the host knows it?"""
    return plan.routed is None and 0 < plan.slot_ids.shape[0] == plan.n_tokens * plan.k


def _only(rows: Tensor, routed: Tensor) -> Tensor:
    """rows where routed and 0 elsewhere, in both directions: neither value nor gradient of another row gets through."""
    return rows.masked_fill(~routed, 0)


def _on_host(n: Tensor) -> int | None:
    """n as an int, or None where no host can know it."""
    if torch.compiler.is_compiling() or batched(n) or n.is_meta or isinstance(n, FakeTensor):
        return None
    return int(n)


def batched(t: Tensor) -> bool:
    """Is t one tensor for each member of a vmap, below any other transforms of torch.func?"""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


local = Dispatcher(plan, dispatch, combine)
