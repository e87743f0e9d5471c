"""A group's tensors made: views where strides allow, one copy where they merge or stack."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from fmoe.layout.axes import Group, flat


class NotAView(Exception):
    """A tensor that only a copy can make: it merges axes that do not lie side by side, or stacks several tensors."""


def convert(group: Group, params: Mapping[str, Tensor], *, views: bool = False) -> dict[str, Tensor]:
    """The targets of a group: views where strides allow, else copies, laid out in storage as the sources are.

    views: raise NotAView instead of copying.
    """
    if not group.sources:  # an empty window of what names count
        device = next((t.device for t in params.values()), None)
        specs = group.target_specs().items()
        return {n: torch.empty(spec.shape, dtype=spec.dtype, device=device) for n, spec in specs}
    if group.permutation is not None:
        return {group.targets[0]: _permuted(params[group.sources[0]], group.permutation)}
    axes = [a for a in flat(group.dims("source")) if a not in group.rule.unstacked or a in group.parts]
    spread = [
        _pieces(group, params[name], dict(zip(group.stacked, at, strict=True)))
        for name, at in zip(group.sources, group.grid(group.stacked), strict=True)
    ]
    if group.rule.stacked and views:
        raise NotAView
    if group.rule.stacked:
        theirs = (dict(zip(group.rule.unstacked, at, strict=True)) for at in group.grid(group.rule.unstacked))
        made = [_stack(group, pieces, axes, at) for pieces, at in zip(zip(*spread, strict=True), theirs, strict=True)]
    else:
        made = [_arrange(group, piece, axes, views) for piece in spread[0]]
    return dict(zip(group.targets, made, strict=True))


def _pieces(group: Group, tensor: Tensor, at: Mapping[str, int]) -> list[Tensor]:
    """The part of a source that each target takes: a view over the axes common to both."""
    axes, held = flat(group.dims("source")), group.held("source", at)
    if len(axes) != tensor.ndim or any(len(dim) != 1 for dim in group.dims("source")):
        tensor = tensor.reshape([len(held[a]) for a in axes])
    for i, axis in enumerate(axes):
        if axis not in group.rule.unstacked and len(asked := group.asked(axis)) < len(held[axis]):
            tensor = tensor.narrow(i, asked.start, len(asked))
    pieces = [tensor]
    for axis in group.rule.unstacked:
        i = axes.index(axis)
        if axis in group.parts:
            pieces = [p.narrow(i, r.start, len(r)) for p in pieces for r in group.parts[axis]]
        else:
            inside = slice(group.asked(axis).start - held[axis].start, group.asked(axis).stop - held[axis].start)
            pieces = [q for p in pieces for q in p.unbind(i)[inside]]
            axes.remove(axis)
    return pieces


def _arrange(group: Group, piece: Tensor, axes: list[str], views: bool) -> Tensor:
    """A piece over common axes, as the target's dimensions: permuted, then merged."""
    dims = group.dims("target")
    order = [axes.index(a) for i in group.storage for a in dims[i]]
    piece = _permuted(piece, order)
    if any(len(dim) != 1 for dim in dims):
        size = dict(zip([axes[i] for i in order], piece.shape, strict=True))
        shape = [prod(size[a] for a in dims[i]) for i in group.storage]
        try:
            piece = piece.view(shape) if views else piece.reshape(shape)
        except RuntimeError:
            raise NotAView from None
    return _permuted(piece, _inverse(group.storage))


def _stack(group: Group, pieces: tuple[Tensor, ...], axes: list[str], at: Mapping[str, int]) -> Tensor:
    """A target of several sources: one `torch.stack` where they lie in storage one after the other.

    at: the target's own coordinates, which say how long its part of a ragged axis is.
    """
    dims = group.dims("target")
    order = [a for i in group.storage for a in dims[i]]
    if order == [*group.stacked, *axes] and not set(group.stacked) & set(group.parts):
        whole = torch.stack(pieces)
    else:
        sizes = group.held("target", at)
        whole = pieces[0].new_empty([len(sizes[a]) for a in order])
        for here, piece in zip(group.grid(group.stacked), pieces, strict=True):
            taken, box = group.taken(dict(zip(group.stacked, here, strict=True))), whole
            for i, axis in enumerate(order):
                if axis in group.stacked:
                    box = box.narrow(i, taken[axis].start - sizes[axis].start, len(taken[axis]))
            box.copy_(piece.permute([axes.index(a) for a in order if a in axes]).reshape(box.shape))
    sizes = group.held("target", at)
    shape = [prod(len(sizes[a]) for a in dims[i]) for i in group.storage]
    return _permuted(whole.reshape(shape), _inverse(group.storage))


def _permuted(tensor: Tensor, order: Sequence[int]) -> Tensor:
    return tensor if list(order) == sorted(order) else tensor.permute(*order)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
