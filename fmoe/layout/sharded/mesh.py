"""Plans and device meshes: which experts of a plan are this rank's, and the DTensors that they become."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmoe import sharding
from fmoe.layout.pipeline import Plan
from fmoe.layout.sharded.shards import nested
from fmoe.types import AdapterError, Problem, TensorSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_EP_DIMS = {"ep", "ep_shard", "ep_replicate"}


def experts_of_rank(plan: Plan, mesh: "DeviceMesh") -> tuple[dict[str, TensorSpec], range]:
    """The stacks of experts that come out of a plan, in full, and the range of experts that is this rank's.

    Along `ep`; a mesh of one dim, of whatever other name, is taken as that (FSDP cuts dim 0 alike).
    """
    stacks = plan.stacks("e")
    counts = {spec.shape[0] for spec in stacks.values()}
    if len(counts) > 1:
        raise AdapterError([Problem(f"stacks of {sorted(counts)} experts cannot share one mesh", tuple(stacks))])
    count, names = max(counts, default=0), set(mesh.mesh_dim_names or ())
    if names and names <= _EP_DIMS - {"ep"}:
        return stacks, range(count)
    return stacks, range(*sharding.get_expert_range_for_rank_from_mesh(mesh, count))


def placed(plan: Plan, params: Mapping[str, Any], stacks: Mapping[str, TensorSpec]) -> set[str]:
    """The stacks made of DTensors that say who has what of them: these follow their own placements, cut no further."""
    gathered = plan.gathered("e")
    theirs = lambda s: sharding.is_dtensor(t := params[s]) and (s not in gathered or _cut(t, "ep"))
    return {t for sources, targets in plan.units() for t in targets if t in stacks and any(map(theirs, sources))}


def distributed(local: Tensor, mesh: "DeviceMesh", shape: tuple[int, ...]) -> Tensor:
    """This rank's experts as the DTensor of all, cut on `ep_shard` too where the mesh has it.

    local may be a DTensor on other dims of the mesh: its placements there stay.
    """
    names = mesh.mesh_dim_names or ()
    if not sharding.is_dtensor(local) and (mesh.ndim > 1 or names and set(names) <= _EP_DIMS):
        return sharding.create_dtensor_from_local(sharding.ep_shard_slice(local, mesh), mesh, shape=shape)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    where: dict[str, Any] = {names[0] if names else "": Shard(0)} if mesh.ndim == 1 else {"ep": Shard(0)}
    if sharding.is_dtensor(local):
        theirs = local.device_mesh.mesh_dim_names or ()
        if not theirs or not set(theirs) <= set(names) or sharding.get_submesh(mesh, theirs) != local.device_mesh:
            raise AdapterError(f"a DTensor of one expert on {local.device_mesh}, expected one on dims of {mesh}")
        where = dict(zip(theirs, local.placements, strict=True)) | where
        local = local.to_local()
    kept = [where.get(n, Replicate()) for n in names or ("",)]
    stride = nested(local, shape)
    sharding._part_of_rank(shape[0], mesh, names.index("ep") if "ep" in names else 0, experts=True)  # as DTensor cuts?
    return DTensor.from_local(local, mesh, kept, run_check=False, shape=torch.Size(shape), stride=stride)


def _cut(tensor: Any, dim: str) -> bool:
    names = tensor.device_mesh.mesh_dim_names or ()
    return dim in names and not tensor.placements[names.index(dim)].is_replicate()
