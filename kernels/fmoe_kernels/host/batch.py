"""vmap of an opaque function: one call for each member of the batch."""

from typing import Any

import torch
from torch import Tensor


def one_by_one(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """(results stacked along a new first dimension, that dimension for each): the body of a `vmap` staticmethod."""
    batched = [isinstance(a, Tensor) and d is not None for a, d in zip(args, in_dims, strict=True)]
    members = [
        function.apply(*(a.select(d, i) if here else a for a, d, here in zip(args, in_dims, batched, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(members[0], Tensor):
        return torch.stack(members), 0
    return tuple(torch.stack(parts) for parts in zip(*members, strict=True)), (0,) * len(members[0])
