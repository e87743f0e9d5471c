"""Which experts are mine: on real processes, which may fail or hang."""

import multiprocessing
import time

import distributed
import pytest
import torch
import torch.distributed as dist
from sharding_cases import PLACEMENTS, flat
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fmoe.sharding import (
    create_dtensor_from_local,
    ep_shard_slice,
    get_expert_range_for_rank_from_mesh,
    is_dtensor,
    split_experts_weights_dtensor_aware,
    validate_dtensor_expert_sharding,
)


def own(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """What a load does: my experts of a plain tensor, my part of dim 1, and the DTensor of these."""
    start, end = get_expert_range_for_rank_from_mesh(mesh, len(whole))
    return create_dtensor_from_local(ep_shard_slice(whole[start:end], mesh), mesh, shape=whole.shape)


def check_split(tensor: DTensor, whole: torch.Tensor, want: list[int], *kept: str) -> None:
    """The ids are those, and each element, gathered, is its expert. Every rank of the mesh calls this."""
    experts, ids = split_experts_weights_dtensor_aware(tensor, len(whole))
    assert ids == want
    for e, expert in zip(ids, experts, strict=True):
        assert list(getattr(expert, "placements", ())) == [PLACEMENTS[k] for k in kept]
        assert torch.equal(expert.full_tensor() if is_dtensor(expert) else expert, whole[e])


def on_two_ranks() -> None:
    rank, x, uneven = dist.get_rank(), flat(4, 4, 6), flat(2, 5, 3)
    mine = [2 * rank, 2 * rank + 1]
    ep, fsdp = (init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("ep", "dp_shard_cp"))
    for whole in (x, x.mT, x[:, 0], flat(3, 2), flat(1, 2)):
        assert torch.equal(own(whole, ep).full_tensor(), whole)
    check_split(own(x, ep), x, mine)
    check_split(own(flat(1, 2), ep), flat(1, 2), [0][rank:])
    check_split(distribute_tensor(x, fsdp, [Shard(0)]), x, mine)
    check_split(distribute_tensor(x, fsdp, [Shard(1)]), x, [0, 1, 2, 3], "0")
    check_split(distribute_tensor(x, fsdp, [Shard(2)]), x, [0, 1, 2, 3], "1")
    check_split(distribute_tensor(uneven, fsdp, [Shard(1)]), uneven, [0, 1], "0")
    check_split(distribute_tensor(x.mT, ep, [Replicate()]), x.mT, [0, 1, 2, 3])
    weight = distribute_tensor(x, fsdp, [Shard(1)]).requires_grad_()
    split_experts_weights_dtensor_aware(weight, 4)[0][2].sum().backward()
    assert weight.grad.full_tensor().sum((1, 2)).tolist() == [0, 0, 24, 0]


def on_four_ranks() -> list[str]:
    rank, x, eight = dist.get_rank(), flat(4, 4, 6), flat(8, 2)
    for other, kept in (("ep_shard", "0"), ("ep_replicate", "R")):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=(other, "ep"))
        for whole in (x, x.mT, flat(3, 2)):
            tensor = own(whole, mesh)
            assert torch.equal(tensor.full_tensor(), whole) and validate_dtensor_expert_sharding(tensor, len(whole))
        check_split(own(x, mesh), x, [2 * (rank % 2), 2 * (rank % 2) + 1], kept)
    three, four = (DeviceMesh("cpu", list(range(n)), mesh_dim_names=("ep",)) for n in (3, 4))
    if rank < 3:
        assert torch.equal(own(eight, three).full_tensor(), eight)
        check_split(own(eight, three), eight, [[0, 1, 2], [3, 4, 5], [6, 7]][rank])
    else:
        with pytest.raises(ValueError, match="no one place for this process"):
            own(eight, three)
    errors = []
    for E in (5, 10):
        with pytest.raises(ValueError, match=f"{E} experts on 4 ranks: .*; use a size that divides {E}") as made:
            own(flat(E, 2), four)
        with pytest.raises(ValueError, match=f"{E} experts on 4 ranks: .*; use a size that divides {E}") as split:
            split_experts_weights_dtensor_aware(distribute_tensor(flat(E, 2), four, [Shard(0)]), E)
        errors += [str(made.value), str(split.value)]
    return errors


def fail_after_two_ranks() -> None:
    on_two_ranks()
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def test_four_processes() -> None:
    errors = distributed.run(on_four_ranks, 4)
    assert len(errors[0]) == 4 and errors == errors[:1] * 4


def test_two_processes_and_their_failure() -> None:
    # one spawn for both: on_two_ranks passes, then one rank fails while the other waits for it
    with pytest.raises(
        RuntimeError, match="(?s)on 2 ranks: rank 1 failed.*in fail_after_two_ranks.*KeyError: 'the cause'"
    ):
        distributed.run(fail_after_two_ranks, 2)


def test_a_hanging_process_is_killed() -> None:
    started = time.time()
    with pytest.raises(TimeoutError, match=r"(?s)sleep on 1 ranks: ranks \[0\] .*killed"):
        distributed.run(time.sleep, 1, 60, timeout=1)
    assert time.time() - started < 10 and not multiprocessing.active_children()
