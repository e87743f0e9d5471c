"""vmap of an opaque function: one call for each member of the batch."""

from typing import Any

import torch
from torch import Tensor


def one_by_one(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """(results stacked along a new first dimension, that dimension for each): the body of a `vmap` staticmethod."""
    batched = [isinstance(a, Tensor) and d is not None for a, d in zip(args, in_dims, strict=True)]
    # of no members the shapes come from one of zeros
    args = tuple(
        _one(a, d) if here and not info.batch_size else a for a, d, here in zip(args, in_dims, batched, strict=True)
    )
    members = [
        function.apply(*(a.select(d, i) if here else a for a, d, here in zip(args, in_dims, batched, strict=True)))
        for i in range(info.batch_size or 1)
    ]
    if isinstance(members[0], Tensor):
        return torch.stack(members)[: info.batch_size], 0
    parts = zip(*members, strict=True)
    return tuple(torch.stack(part)[: info.batch_size] for part in parts), (0,) * len(members[0])


def _one(batch: Tensor, dim: int) -> Tensor:
    """A batch of no members as one of a single member of zeros."""
    return batch.new_zeros(*batch.shape[:dim], 1, *batch.shape[dim + 1 :])
