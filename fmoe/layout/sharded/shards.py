"""DTensors converted where they are: each rank's part, labelled as what it is. Nothing here communicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmoe.folding import short
from fmoe.layout.axes import Group
from fmoe.layout.claims import some
from fmoe.layout.eager.converting import convert
from fmoe.layout.sharded.placements import cuts_of, follow, fused
from fmoe.sharding import get_submesh, is_dtensor
from fmoe.types import AdapterError, Problem, bits

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def convert_sharded(group: Group, params: Mapping[str, Tensor], *, views: bool = False) -> dict[str, Any]:
    """The targets of a group of DTensors, of which this rank has a part: `convert` of the local parts, labelled.

    Targets that live wholly on one rank are plain, and on the others left out. Raises AdapterError where the sources'
    placements differ, or the targets' cannot be said, and NotAView as `convert`.
    """
    tensors = [params[n] for n in group.sources]
    first = tensors[0]
    odd = [n for n in group.sources if not is_dtensor(params[n]) or _place(params[n]) != _place(first)]
    if odd or not is_dtensor(first):
        there = ", ".join(f"{n!r} {_where(params[n])}" for n in dict.fromkeys([group.sources[0], *odd[:3]]))
        raise AdapterError(
            [Problem(f"one stack, several placements: {there} (rule {short(str(group.rule))})", tuple(odd))]
        )
    whole = fused(group)
    try:
        local, made = follow(whole, first)
    except (ValueError, TypeError) as error:
        text = (
            f"{some(group.sources, 3)} {_where(first)}: {error} (rule {short(str(group.rule))}); redistribute it first"
        )
        raise AdapterError([Problem(text, tuple(group.sources))]) from None
    parts = {n: t.to_local() for n, t in zip(group.sources, tensors, strict=True) if is_dtensor(t)}
    expected = local.shape("source", {})
    if wrong := [n for n, t in parts.items() if not group.parts and t.shape != expected]:
        text = f"{some(wrong, 3)} {_where(first)}: this rank's part is {list(parts[wrong[0]].shape)}, expected "
        raise AdapterError([Problem(f"{text}{list(expected)} of {list(first.shape)}", tuple(wrong))])
    shapes = {n: spec.shape for n, spec in group.target_specs().items()}
    return labelled(convert(local, parts, views=views), shapes, first, made)


def blockwise(
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    given: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    block: tuple[int, ...],
) -> dict[str, Any]:
    """change(given), tensors of these shapes, part by part of DTensors.

    block: the first tensor's last dimensions may be cut between so many entries (0: not at all), others between any.
    Raises AdapterError, on every rank alike, unless all are cut alike, and there.
    """
    tensors = list(given.values())
    first = tensors[0]
    if not any(map(is_dtensor, tensors)):
        return change(given)
    alike = all(
        is_dtensor(t) and (t.device_mesh, t.placements) == (first.device_mesh, first.placements) for t in tensors
    )
    fits = alike and not any(p.is_partial() for p in first.placements)
    if fits and block:
        side = dict(enumerate(block, first.ndim - len(block)))
        cuts = [(d, c) for d, c in cuts_of(first) if d is not None and c is not None and c.n > 1]
        fits = all(
            c.blocks == 1 and bool(side.get(d, 1)) and -(-first.shape[d] // c.n) % side.get(d, 1) == 0 for d, c in cuts
        )
        fits &= len({d for d, _ in cuts}) == len(cuts)
    if not fits:
        there = ", ".join(f"{n!r} {_where(t)}" for n, t in given.items())
        sides = dict.fromkeys(block)
        parts = f", each part whole blocks of {' x '.join(map(str, sides))}" * any(b != 1 for b in block)
        text = f"{there}: expected DTensors placed alike, no sums{parts}: redistribute, or pass plain ones and a mesh"
        raise AdapterError([Problem(text, tuple(given))])
    made = change({n: t.to_local() for n, t in given.items()})
    return labelled(made, {n: shapes[n] for n in made}, first, list(first.placements))


def labelled(
    made: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], like: DTensor, placements: list[Any]
) -> dict[str, Any]:
    """Local tensors as DTensors on the mesh dims that are left; plain where those leave nothing to cut or copy."""
    from torch.distributed.tensor import DTensor

    mesh, rest = like.device_mesh, [m for m, p in enumerate(placements) if p is not None]
    if len(rest) < mesh.ndim:
        if all(mesh.size(m) == 1 for m in rest):
            return dict(made)
        if not mesh.mesh_dim_names:
            raise AdapterError(f"{mesh} has no names for its dims, and a part of it is needed: give mesh_dim_names")
        mesh = get_submesh(mesh, tuple(mesh.mesh_dim_names[m] for m in rest))
    kept = [placements[m] for m in rest]
    return {
        n: DTensor.from_local(t, mesh, kept, run_check=False, shape=torch.Size(shapes[n]), stride=nested(t, shapes[n]))
        for n, t in made.items()
    }


def nested(local: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of that shape whose dims are nested as local's are."""
    order = sorted(range(len(shape)), key=local.stride().__getitem__, reverse=True)
    return torch.empty_permuted(tuple(shape), order, device="meta").stride()


def same_parts(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie alike, and their parts on this rank hold the same bits."""
    if is_dtensor(a) and is_dtensor(b) and _place(a) == _place(b):
        a, b = a.to_local(), b.to_local()
    return not is_dtensor(a) and not is_dtensor(b) and torch.equal(bits(a), bits(b))


def _place(tensor: Any) -> tuple[Any, ...] | None:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def _where(tensor: Tensor) -> str:
    return f"{tuple(tensor.placements)} on {tensor.device_mesh}" if is_dtensor(tensor) else "plain"
