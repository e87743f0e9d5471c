"""Expert parameters that are DTensors, for `fmoe.experts`: this rank's experts, and the group that has the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fmoe.entrance import held
from fmoe.shapes import NORM
from fmoe.sharding import is_dtensor
from fmoe.types import Params

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def local_params(params: Params) -> tuple[dict[str, Tensor], ProcessGroup | None]:
    """(this rank's experts [E / ranks, ..] as plain tensors, the group along `ep`); group None: all experts are here.

        mine, group = local_params(params)
        with fmoe.dispatch.all_to_all(group) as d:
            y = fmoe.experts(mine, x, routing, config, dispatcher=d)

    Along the mesh dim `ep`, or the only one of a mesh if that is not `ep_shard` or `ep_replicate`, experts stay where
    they are (Shard(0)). Along others they are gathered; in backward the gradients are summed over these and cut again.
    Tokens of all ranks of the group reach their experts through the dispatcher. So the gradient of a parameter is the
    sum over all ranks of its mesh, each with the tokens that it has: divide by their number where a loss is a mean over
    ranks, and where ranks have the same tokens. Plain tensors stay as they are; a norm that serves all experts is whole
    on every rank.

    Raises ValueError where `ep` cuts another dim than that of the experts, or not all DTensors alike.

    >>> import torch
    >>> local_params({"down_projs": torch.ones(2, 1, 1)})
    ({'down_projs': tensor([[[1.]],
    <BLANKLINE>
            [[1.]]])}, None)
    """
    out: dict[str, Tensor] = {}
    groups: dict[str, ProcessGroup | None] = {}
    for name, p in params.items():
        if not is_dtensor(p):
            out[name] = p
            continue
        from torch.distributed.tensor import Partial, Replicate, Shard

        mesh, ep = p.device_mesh, ep_dim(p.device_mesh)
        if name == NORM:  # of no expert: whole on every rank, and its gradient a sum over all of them
            whole = p.redistribute(placements=[Replicate()] * mesh.ndim)
            out[name] = whole.to_local(grad_placements=[Partial()] * mesh.ndim)
            continue
        here = [i == ep and p.placements[i] == Shard(0) for i in range(mesh.ndim)]
        if ep is not None and not here[ep] and not p.placements[ep].is_replicate():
            found = f"{p.placements[ep]} along {mesh.mesh_dim_names or 'the mesh'}"
            raise ValueError(f"local_params: {name!r} is {found}, expected Shard(0) along ep: redistribute it first")
        gathered = p.redistribute(placements=[Shard(0) if keep else Replicate() for keep in here])
        out[name] = gathered.to_local(grad_placements=[Shard(0) if keep else Partial() for keep in here])
        groups[name] = mesh.get_group(ep) if ep is not None and here[ep] and mesh.size(ep) > 1 else None
    if len(set(groups.values())) > 1:
        cut = {name: "cut along ep" if group is not None else "whole" for name, group in groups.items()}
        raise ValueError(f"local_params: {cut}, on one group at most: expected all DTensors on one mesh, cut alike")
    return out, next(iter(groups.values()), None)


def ep_dim(mesh: DeviceMesh) -> int | None:
    """Which dim of a mesh cuts experts: the one called `ep`, or the only one, unless it is `ep_shard` or the like.

    >>> from types import SimpleNamespace
    >>> ep_dim(SimpleNamespace(mesh_dim_names=("ep_replicate", "ep"), ndim=2))
    1
    """
    names = mesh.mesh_dim_names or ("",)
    alone = mesh.ndim == 1 and not names[0].startswith("ep_")
    return names.index("ep") if "ep" in names else 0 if alone else None


held(globals(), error=ValueError)
