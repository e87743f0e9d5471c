"""The part of a whole tensor that a plan's ranges speak of."""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Literal

from torch import Tensor

from fmoe.axes import Dims, Group, flat
from fmoe.pipeline import Plan
from fmoe.plan import TablePlan

Narrow = Callable[[Tensor], Tensor]


def narrowing(plan: Plan, side: Literal["sources", "targets"]) -> dict[str, Narrow]:
    """name -> the function from the whole tensor of that name to what the plan's ranges leave of it.

    Names without a range are left out. A view wherever whole dimensions are cut.
    """
    found: dict[str, Narrow] = {}
    for group in groups(plan):
        dims = group.dims(group.rule.source if side == "sources" else group.rule.target)
        here = set(flat(dims)) - group.local  # of what is local the whole tensor is the range
        window = {a: r for a, r in group.window.items() if a in here and len(r) < group.sizes[a]}
        if window:
            cut = partial(_narrow, dims=dims, sizes=group.sizes, window=window)
            found |= dict.fromkeys(group.sources if side == "sources" else group.targets, cut)
    return found


def groups(plan: Plan) -> Iterator[Group]:
    return (group for stage in plan.stages if isinstance(stage, TablePlan) for group in stage.groups)


def _narrow(tensor: Tensor, *, dims: Dims, sizes: dict[str, int], window: dict[str, range]) -> Tensor:
    axes = flat(dims)
    if any(len(dim) != 1 for dim in dims):
        tensor = tensor.reshape([sizes[a] for a in axes])
    for i, axis in enumerate(axes):
        if axis in window:
            tensor = tensor.narrow(i, window[axis].start, len(window[axis]))
    size = dict(zip(axes, tensor.shape, strict=True))
    return tensor.reshape([prod(size[a] for a in dim) for dim in dims])
