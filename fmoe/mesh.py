"""Plans and device meshes: which experts of a plan are this rank's, and DTensors of experts in and out of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmoe import sharding
from fmoe.pipeline import Plan
from fmoe.types import AdapterError, Problem, TensorSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def experts_of_rank(plan: Plan, mesh: "DeviceMesh") -> tuple[dict[str, TensorSpec], range]:
    """The stacks of experts that come out of a plan, in full, and the range of experts that is this rank's."""
    stacks = plan.stacks("e")
    counts = {spec.shape[0] for spec in stacks.values()}
    if len(counts) > 1:
        raise AdapterError([Problem(f"stacks of {sorted(counts)} experts cannot share one mesh", tuple(stacks))])
    return stacks, range(*sharding.get_expert_range_for_rank_from_mesh(mesh, max(counts, default=0)))


def distributed(local: Tensor, mesh: "DeviceMesh", shape: tuple[int, ...]) -> Tensor:
    """This rank's experts as the DTensor of all, cut on `ep_shard` too where the mesh has it."""
    return sharding.create_dtensor_from_local(sharding.ep_shard_slice(local, mesh), mesh, shape=shape)


def local_experts(plan: Plan, params: Mapping[str, Any]) -> tuple[dict[str, Any], range]:
    """The tensors, with DTensors of experts as their local part, and the range of experts that those hold.

    Raises AdapterError for a DTensor that is cut on more than its experts, or several ranges.
    """
    held, ranges = dict(params), dict[range, str]()
    for name in plan.touching("e"):
        if sharding.is_dtensor(whole := params[name]):
            held[name], *ends = sharding.get_expert_slice_for_rank(whole, whole.shape[0])
            ranges[range(*ends)] = name
            if held[name].shape[1:] != whole.shape[1:]:
                text = f"{name!r} is cut on more than its experts ({whole.placements}): gather it on that mesh dim"
                raise AdapterError([Problem(text, (name,))])
    if len(ranges) > 1:
        text = f"stacks of different experts, {ranges}: convert them one by one"
        raise AdapterError([Problem(text, tuple(ranges.values()))])
    return held, next(iter(ranges))
