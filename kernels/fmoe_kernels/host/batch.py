"""vmap of an opaque function: one call for each member of the batch.

Two kinds of it: torch.vmap, and the older one in which autograd takes gradients in batches (`is_grads_batched`, and
`vectorize` of torch.autograd.functional). The older asks no Function how it is batched, and hides from autograd that a
batch requires a gradient.
"""

from collections.abc import Callable
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


older = torch._C._functorch.is_legacy_batchedtensor


def of_members(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), in the older vmap called for each member of the batch: it never sees the batch itself."""
    for a in args:
        if isinstance(a, Tensor) and older(a):
            return _each(function, args)
    return function(*args)


def _each(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    here = {i for i, a in enumerate(args) if isinstance(a, Tensor) and older(a)}
    wholes = [torch._remove_batch_dim(a, level, 1, 0) if i in here else a for i, a in enumerate(args)]
    size = len(wholes[min(here)])
    made = [function(*(a[n] if i in here else a for i, a in enumerate(wholes))) for n in range(size)]
    whole = lambda parts: None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
    return whole(made) if isinstance(made[0], Tensor) else tuple(whole(parts) for parts in zip(*made, strict=True))
