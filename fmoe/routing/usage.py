"""What one does with a routing: count it, balance it, cut it to a capacity. `fmoe.routing` has these names."""

from operator import index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmoe.shapes import all_tensors, computed_with, counted, odd
from fmoe.types import INTEGERS, Routing, brief

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def count(routing: Routing, n_experts: int, group: "ProcessGroup | None" = None) -> Tensor:
    """counts [E] int64: how many slots go to each expert; masked tokens and ids outside [0, E) go to none.

    group: a torch.distributed group, of whose ranks the counts are added up; every rank of it makes the call.

    >>> count(Routing(torch.tensor([[0, 2], [2, -1]]), torch.ones(2, 2)), 3).tolist()
    [1, 0, 2]
    """
    if not 0 <= n_experts < 2**31:
        raise ValueError(f"routing.count: n_experts is {brief(n_experts)}, expected a number of experts")
    _check(routing)
    counts = counts_of(Routing(*routing), index(n_experts))  # also of a scalar of NumPy's
    return counts if group is None else summed(counts, group)


def counts_of(routing: Routing, n_experts: int) -> Tensor:
    """The same of a routing that is known to be one."""
    ids, gone = _slots(routing, n_experts)
    ids = ids.masked_fill(gone, n_experts).flatten()
    # integers: whatever the order they are added in, the sum is the same
    return ids.new_zeros(n_experts + 1).scatter_add(0, ids, torch.ones_like(ids))[:n_experts]


def update_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean(counts) - counts), a new tensor: experts with less than their share gain, others lose.

    bias [E], counts [E]. Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2; rate is its gamma.

    >>> update_bias(torch.zeros(3), torch.tensor([4, 2, 0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    computed_with("update_bias", "bias", bias)
    all_tensors("update_bias", {"counts": counts}, "")
    if bias.ndim != 1 or bias.shape != counts.shape or counts.is_complex():
        found = f"bias is {list(bias.shape)}, counts are {counts.dtype} {list(counts.shape)}"
        raise ValueError(f"update_bias: {found}, expected [E] both, counts real")
    if strange := odd({"counts": counts}, bias.device):
        raise ValueError(f"update_bias: {strange[0].replace('where x is', 'where bias is')}")
    rate = float(rate) if type(rate) is int else rate  # of more than 64 bits too
    wide = counts.to(torch.float64)
    return bias + (wide.mean() - wide).sign().to(bias.dtype) * rate


def drop(routing: Routing, capacity: int, by: str = "weight") -> Routing:
    """The routing in which no expert has more than `capacity` slots: what is too much gets id -1 and weight 0.

    by="weight": an expert keeps its heaviest slots, of equal ones the first. by="position": it keeps the first, earlier
    tokens first, and of one token its first choice first. Masked tokens take no place. Ids are compared, so E is not
    asked for; ids below 0 stay. Raises ValueError for another `by` and for a capacity below 0.

    >>> drop(Routing(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.3, 0.7], [0.6, 0.4]])), 1).indices.tolist()
    [[-1, 1], [0, -1]]
    """
    if by not in ("weight", "position") or capacity < 0:
        told = "by='weight' or 'position' and capacity >= 0"
        raise ValueError(f"drop: by={by!r}, capacity={brief(capacity)}, expected {told}")
    ids, gone = slots(routing, None)
    _, weights, mask = Routing(*routing)
    flat = ids.masked_fill(gone, -1).flatten()
    order = weights.detach().flatten().argsort(descending=True, stable=True) if by == "weight" else None
    ranked = flat if order is None else flat[order]
    ids_in_turn, within = ranked.sort(stable=True)
    # a slot's place among those of its expert: how far it is from the first that has the same id
    at = torch.arange(flat.shape[0], device=flat.device)
    first = torch.searchsorted(ids_in_turn, ids_in_turn)
    place = torch.empty_like(at).scatter(0, within if order is None else order[within], at - first)
    over = (place >= min(index(capacity), 2**63 - 1)).view_as(ids) & ~gone  # whatever the capacity, in int64
    return Routing(ids.masked_fill(over, -1), weights.masked_fill(over, 0), mask)


def load(counts: Tensor) -> dict[str, float]:
    """How evenly experts are used: max_over_mean (1 is even), entropy in nats (log E is even), idle_experts.

    counts [E]; of no slots at all max_over_mean is 0. Waits for the device.

    >>> load(torch.tensor([2, 2, 0, 0]))
    {'max_over_mean': 2.0, 'entropy': 0.6931471805599453, 'idle_experts': 2}
    """
    counted("routing.load", "counts", counts, 1)
    wide = counts.to(torch.float64)
    share = wide / wide.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    most = float(share.max()) * len(counts) if len(counts) else 0.0
    return {"max_over_mean": most, "entropy": abs(float(entropy)), "idle_experts": int((counts == 0).sum())}


def slots(routing: Routing, n_experts: int | None) -> tuple[Tensor, Tensor]:
    """(ids [T, K] int64, gone [T, K] bool): which slots go nowhere."""
    _check(routing)
    return _slots(Routing(*routing), n_experts)


def _slots(routing: Routing, n_experts: int | None) -> tuple[Tensor, Tensor]:
    indices, _, mask = routing
    ids = indices.long()
    gone = ids < 0 if n_experts is None else (ids < 0) | (ids >= n_experts)
    return ids, gone if mask is None else gone | ~mask[:, None]


def _check(routing: Routing) -> None:
    if not isinstance(routing, tuple) or len(routing) not in (2, 3):
        raise ValueError(f"routing is of type {type(routing).__name__}, expected Routing(indices, weights, mask)")
    indices, weights, mask = Routing(*routing)
    all_tensors("routing", {"indices": indices, "weights": weights} | ({} if mask is None else {"mask": mask}), "")
    here = {"weights": weights} if mask is None else {"weights": weights, "mask": mask}
    if indices.ndim != 2 or indices.dtype not in INTEGERS:
        raise ValueError(f"routing: indices are {indices.dtype} {list(indices.shape)}, expected integer [T, K]")
    if weights.shape != indices.shape or not weights.is_floating_point():
        told = f"floating {list(indices.shape)}, as indices are"
        raise ValueError(f"routing: weights are {weights.dtype} {list(weights.shape)}, expected {told}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != indices.shape[:1]):
        told = f"torch.bool [T={indices.shape[0]}]"
        raise ValueError(f"routing: mask is {mask.dtype} {list(mask.shape)}, expected {told}")
    if strange := odd({"indices": indices, **here}, indices.device):
        raise ValueError(f"routing: {strange[0].replace('where x is', 'where indices are')}")


def summed(t: Tensor, group: "ProcessGroup") -> Tensor:
    """t added up over the ranks of a group, without gradient."""
    import torch.distributed as dist

    out = t.detach().clone()
    dist.all_reduce(out, group=group)
    return out
