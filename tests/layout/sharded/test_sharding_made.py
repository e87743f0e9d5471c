"""DTensors of experts validated and made: placements that may be, and what is refused."""

import pytest
import torch
from sharding_cases import claim, flat, seen_by

from fmoe.sharding import (
    create_dtensor_from_local,
    validate_dtensor_expert_sharding,
)

VALID = "ep*2=0, ep*2=R, dp_shard_cp*2=0, ep_shard*2=1 ep*2=0, ep_shard*2=1 ep*2=R, ep_shard*2=R ep*2=R"
VALID += ", ep*2=0 ep_shard*2=1, dp*2=0 tp*2=1, _*2=1 _*2=0"
WRONG = "ep*2=1, ep*2=P, _*2=1, dp*1=1, ep_shard*2=0 ep*2=1, ep_shard*2=0 ep*2=R, ep_shard*2=0 ep*2=0"
WRONG += ", ep*2=1 ep_shard*2=0, dp*2=R tp*2=1, dp*2=0 tp*2=0, dp*2=P ep*2=0"


@pytest.mark.parametrize("mesh", VALID.split(", ") + WRONG.split(", "))
def test_validate(mesh: str) -> None:
    with seen_by(0, mesh) as (device_mesh, placements):
        tensor = claim(device_mesh, placements, flat(2, 2), 4, 4)
        with pytest.raises(ValueError, match=r"gate has shape \(4, 4\).*expected 5 experts"):
            validate_dtensor_expert_sharding(tensor, 5, "gate")
        if mesh in VALID.split(", "):
            assert validate_dtensor_expert_sharding(tensor, 4) is True
            return
        with pytest.raises(ValueError, match="gate has unsupported DTensor placement .*: redistribute it to Shard"):
            validate_dtensor_expert_sharding(tensor, 4, "gate")


@pytest.mark.parametrize(
    "mesh, kept, whole",
    [
        ("ep*2=0", ("ep",), (4, 4)),
        ("ep_shard*1=1 ep*2=0", ("ep",), (4, 4)),
        ("ep_replicate*1=R ep_shard*1=1 ep*2=0", ("ep",), (4, 4)),
        ("ep_shard*2=1 ep*2=0", ("ep_shard", "ep"), (4, 8)),
        ("ep_replicate*2=R ep*2=0", ("ep_replicate", "ep"), (4, 4)),
        ("ep_replicate*2=R ep_shard*1=1 ep*2=0", ("ep_replicate", "ep_shard", "ep"), (4, 4)),
        ("ep_shard*2=1", ("ep_shard",), (2, 8)),
        ("ep_shard*1=1", ("ep_shard",), (2, 4)),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_create(mesh: str, kept: tuple[str, ...], whole: tuple[int, int], transposed: bool) -> None:
    local = flat(2, 3, 4).mT if transposed else flat(2, 4, 3)
    dense = torch.empty(whole[0], 3, whole[1]).mT if transposed else torch.empty(*whole, 3)
    with seen_by(0, mesh) as (device_mesh, placements):
        for shape in (None, dense.shape):
            tensor = create_dtensor_from_local(local, device_mesh, rank=0, shape=shape)
            assert tensor.device_mesh.mesh_dim_names == kept
            assert list(tensor.placements) == placements[-len(kept) :]
            assert (tensor.shape, tensor.stride()) == (dense.shape, dense.stride())
            assert tensor.to_local().data_ptr() == local.data_ptr()
        with pytest.raises(ValueError, match=r"shape \(2, 4, 3\), expected \(.*, this rank's of \(6, 6, 3\) on"):
            create_dtensor_from_local(local, device_mesh, shape=(6, 6, 3))


@pytest.mark.parametrize(
    "mesh, local, shape, message",
    [
        ("dp*2=R ep*2=0", flat(2, 4), None, r"'dp', .*expected names among .*'ep_replicate'.* slice"),
        ("_*2=0", flat(2, 4), None, r"mesh dims named \(\), expected names among"),
        ("ep_shard*2=1 ep*2=0", flat(2), None, r"\(2,\) has too few dims"),
        ("ep_shard*2=1 ep*2=0", flat(2), (4,), r"\(4,\) has too few dims"),
        ("ep*4=0", flat(2, 4), (5, 4), "5 experts on 4 ranks"),
    ],
)
def test_create_refuses(mesh: str, local: torch.Tensor, shape: tuple[int, ...] | None, message: str) -> None:
    with seen_by(0, mesh) as (device_mesh, _), pytest.raises(ValueError, match=message):
        create_dtensor_from_local(local, device_mesh, shape=shape)
    assert create_dtensor_from_local(local, None, 0) is local
