"""Tensors cut as torch cuts them, seen by each rank of a fake world."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

PLACEMENTS = {"0": Shard(0), "1": Shard(1), "2": Shard(2), "R": Replicate(), "P": Partial()}
PLACEMENTS["strided"] = _StridedShard(0, split_factor=2)


@contextmanager
def seen_by(rank: int, text: str) -> Iterator[tuple[DeviceMesh, list[Placement]]]:
    """The mesh and placements in "ep_shard*2=1 ep*3=0": names ("_": none), sizes, cut dims. Nothing communicates."""
    names, sizes, places = zip(*(item.replace("=", "*").split("*") for item in text.split()), strict=True)
    sizes = torch.Size(map(int, sizes))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.numel())
    try:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=None if "_" in names else names)
        yield mesh, [PLACEMENTS[place] for place in places]
    finally:
        dist.destroy_process_group()


def flat(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def claim(mesh: DeviceMesh, placements: Sequence[Placement], local: torch.Tensor, *shape: int) -> DTensor:
    """A DTensor of that shape, whatever the local part."""
    return DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=torch.empty(shape).stride())
