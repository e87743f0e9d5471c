"""The part of a whole tensor that a plan's ranges speak of."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.stream.arrange import frame
from fmoe.codecs import CodecPlan
from fmoe.layout.axes import Dims, Group, flat
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.types import TensorSpec


def read(source: Checkpoint, names: Iterable[str], cut: Mapping[str, "Narrow"]) -> dict[str, Tensor]:
    """The tensors of these names, read and not mapped; of what is cut, the bytes that stay, the rest is undefined."""
    names = list(names)
    parts = {n: spans for n in names if n in cut and (spans := _spans(source.specs[n], cut[n])) is not None}
    return source.read(names, parts)


def _spans(spec: TensorSpec, narrow: "Narrow") -> list[tuple[int, int]] | None:
    """(where, how many) bytes of a tensor that a part of it covers; None where that is no view of it."""
    part, item = narrow(torch.empty(spec.shape, dtype=spec.dtype, device="meta")), spec.dtype.itemsize
    if not part._is_view():
        return None
    if not part.numel():
        return []
    runs, size, _ = frame(tuple(part.shape), tuple(s * item for s in part.stride()), item)
    return [(int(part.storage_offset()) * item + at, size) for at in runs]


Narrow = Callable[[Tensor], Tensor]


def narrowing(plan: Plan, side: Literal["sources", "targets"]) -> dict[str, Narrow]:
    """name -> the function from the whole tensor of that name to what the plan's ranges leave of it.

    Names without a range are left out. A view wherever whole dimensions are cut.
    """
    found: dict[str, Narrow] = {}
    names: dict[str, str] = {}  # what the stage before made -> what the plan reads, if that is one tensor
    cut: dict[str, range] = {}  # what it made a range of
    for stage in plan.stages:
        if isinstance(stage, CodecPlan) and side == "sources":
            names = dict(stage.renamed)
            for changed in stage.changes:
                if (part := stage.part(changed)) is not None:
                    found |= {n: partial(_rows, part=part) for n in changed.sources if changed.rows[n]}
        cut = dict(stage.ranges) if isinstance(stage, CodecPlan) else cut
        for group in stage.groups if isinstance(stage, TablePlan) else ():
            made = {group.dims("source")[0][0] for n in group.sources if n in cut}
            if made and side == "sources":
                continue
            dims = group.dims("source" if side == "sources" else "target")
            here = set(flat(dims)) - (group.local - made)  # of what is local the whole tensor is the range
            window = {a: r for a, r in group.window.items() if a in here and len(r) < group.sizes[a]}
            if not window:
                continue
            narrow = partial(_narrow, dims=dims, sizes=group.sizes, window=window)
            for n in group.sources if side == "sources" else group.targets:
                first = names.get(n, n) != n and dims[0] == (next(iter(window)),)
                found[names.get(n, n)] = partial(_rows, part=next(iter(window.values()))) if first else narrow
    return found


def _rows(tensor: Tensor, *, part: range) -> Tensor:
    return tensor.narrow(0, part.start, len(part))


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
