"""Which experts are mine: on fake worlds of any size in this process, and on real gloo processes."""

import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import MagicMock

import distributed
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fmoe import sharding
from fmoe.sharding import (
    create_dtensor_from_local,
    ep_shard_slice,
    expert_range,
    get_expert_range_for_rank_from_mesh,
    get_expert_slice_for_rank,
    get_submesh,
    is_dtensor,
    should_load_expert_for_rank,
    split_experts_weights_dtensor_aware,
    validate_dtensor_expert_sharding,
)

S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
# golden vectors C4: (E, ranks) -> the balanced ranges, and whether torch cuts there too
C4 = {
    (8, 3): ([(0, 3), (3, 6), (6, 8)], True),
    (10, 4): ([(0, 3), (3, 6), (6, 8), (8, 10)], False),
    (5, 4): ([(0, 2), (2, 3), (3, 4), (4, 5)], False),
}


@contextmanager
def fake_rank(rank: int, *sizes: int, names: str | None = None) -> Iterator[DeviceMesh]:
    """The mesh that this rank would see; nothing communicates."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(sizes).numel())
    try:
        yield init_device_mesh("cpu", sizes, mesh_dim_names=tuple(names.split()) if names else None)
    finally:
        dist.destroy_process_group()


def cut(mesh: DeviceMesh, placements: list, *shape: int) -> DTensor:
    """torch's own shards of a tensor whose values are its flat indices."""
    return distribute_tensor(flat(*shape), mesh, placements, src_data_rank=None)


def flat(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


# ranges


@given(st.integers(0, 600), st.integers(1, 80))
def test_ranges_partition_the_experts(E: int, n: int) -> None:
    ranges = [expert_range(E, n, rank) for rank in range(n)]
    assert [e for r in ranges for e in r] == list(range(E))
    assert all(a.stop == b.start and len(b) <= len(a) <= len(b) + 1 for a, b in pairwise(ranges))


@pytest.mark.parametrize("E, n, rank", [(-1, 2, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1)])
def test_range_of_no_rank(E: int, n: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"n_experts={E}, n_ranks={n}, rank={rank}"):
        expert_range(E, n, rank)


@pytest.mark.parametrize("E, n", C4)
def test_golden_c4(E: int, n: int) -> None:
    balanced, agree = C4[E, n]
    for rank in range(n):
        with fake_rank(rank, n, names="ep") as mesh:
            assert get_expert_range_for_rank_from_mesh(mesh, E) == balanced[rank]
            tensor = cut(mesh, [S0], E, 2)
            if agree:
                assert get_expert_slice_for_rank(tensor, E)[1:] == balanced[rank]
                continue
            with pytest.raises(ValueError) as error:
                get_expert_slice_for_rank(tensor, E)
            ours = " ".join(f"{a}:{b}" for a, b in balanced)
            theirs = {10: "0:3 3:6 6:9 9:10", 5: "0:2 2:4 4:5 5:5"}[E]
            assert str(error.value) == (
                f"{E} experts on {n} ranks: expert_range {ours}, DTensor {theirs}; use a size that divides {E}"
            )


@given(st.integers(0, 20), st.integers(1, 7))
def test_ids_are_right_or_every_rank_raises(E: int, n: int) -> None:
    seen = []
    for rank in range(n):
        with fake_rank(rank, n, names="dp_shard_cp") as mesh:
            tensor = cut(mesh, [S0], E, 1)
            try:
                experts, ids = split_experts_weights_dtensor_aware(tensor, E)
            except ValueError:
                seen.append(None)
                continue
            held = tensor.to_local().flatten().tolist()
            assert held == [float(e) for e in ids] == [e.item() for e in experts]
            seen.append(ids)
    if None not in seen:
        assert sum(seen, []) == list(range(E))
    else:
        assert set(map(str, seen)) == {"None"} and E % n


@pytest.mark.parametrize(
    "rank, sizes, names, E, want",
    [
        (1, [4], "ep", 8, (2, 4)),
        (0, [3], "ep", 8, (0, 3)),
        (2, [4], "dp", 8, (4, 6)),
        (2, [4], None, 8, (4, 6)),
        (3, [4], "ep", 2, (2, 2)),
        (1, [2, 2], "ep_shard ep", 8, (4, 8)),
        (2, [2, 2], "ep_shard ep", 8, (0, 4)),
    ],
)
def test_range_from_mesh(rank: int, sizes: list[int], names: str | None, E: int, want: tuple[int, int]) -> None:
    with fake_rank(rank, *sizes, names=names) as mesh:
        assert get_expert_range_for_rank_from_mesh(mesh, E) == want
        loaded = [e for e in range(-1, E + 1) if should_load_expert_for_rank(e, mesh, E)]
        assert loaded == list(range(*want))


def test_range_without_mesh_and_without_place() -> None:
    assert get_expert_range_for_rank_from_mesh(None, 8) == (0, 8)
    assert should_load_expert_for_rank(7, None, 8) and not should_load_expert_for_rank(8, None, 8)
    with fake_rank(3, 2, 2, names="dp cp") as mesh:
        with pytest.raises(ValueError, match="no one place .*dp=2, cp=2.* must be 1-D or have `ep`"):
            get_expert_range_for_rank_from_mesh(mesh, 8)
        with pytest.raises(ValueError, match="no one place for this process in .*ep=3"):
            get_expert_range_for_rank_from_mesh(DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("ep",)), 8)
        assert get_submesh(mesh, ("cp",)).get_local_rank() == 1
        with pytest.raises(KeyError, match="nope"):
            get_submesh(mesh, ("nope",))


def test_a_mesh_is_asked_only_what_the_seed_asks() -> None:
    mesh = MagicMock(mesh_dim_names=("dp", "ep"))
    mesh.__getitem__.return_value.size.return_value = 4
    mesh.__getitem__.return_value.get_local_rank.return_value = 1
    assert get_expert_range_for_rank_from_mesh(mesh, 8) == (2, 4)
    mesh.__getitem__.assert_called_once_with(("ep",))


# slices and splits


def test_plain_tensors() -> None:
    x = flat(4, 2)
    local, *bounds = get_expert_slice_for_rank(x, 9)
    assert local is x and bounds == [0, 9] and not is_dtensor(x)
    experts, ids = split_experts_weights_dtensor_aware(x, 4)
    assert ids == [0, 1, 2, 3] and all(e.data_ptr() == x[i].data_ptr() for i, e in enumerate(experts))
    for wrong in (x, torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match="Expected local tensor first dimension to be 9, got shape .* all 9 experts"
        ):
            split_experts_weights_dtensor_aware(wrong, 9)


@pytest.mark.parametrize(
    "rank, sizes, names, placements, want, rest, kept",
    [
        (1, [4], "ep", [S0], range(2, 4), None, None),
        (2, [4], "dp_shard_cp", [S0], range(4, 6), None, None),
        (2, [4], None, [S0], range(4, 6), None, None),
        (1, [4], "ep", [R], range(8), None, None),
        (1, [4], "dp", [R], range(8), ("dp",), (R,)),
        (1, [4], "ep", [S1], range(8), ("ep",), (S0,)),
        (1, [4], None, [S2], range(8), None, (S1,)),
        (1, [2, 2], "ep_shard ep", [S1, S0], range(4, 8), ("ep_shard",), (S0,)),
        (2, [2, 2], "ep_shard ep", [S1, S0], range(4), ("ep_shard",), (S0,)),
        (1, [2, 2], "ep_shard ep", [S2, R], range(8), ("ep_shard",), (S1,)),
        (1, [2, 1], "ep_shard ep", [S1, S0], range(8), ("ep_shard",), (S0,)),
        (1, [1, 2], "ep_shard ep", [S1, S0], range(4, 8), None, None),
        (1, [1, 2], "dp ep", [S0, S0], range(4, 8), None, None),
        (1, [1, 2], "dp ep", [Partial(), S0], range(4, 8), None, None),
        (3, [2, 2], "ep_replicate ep", [R, S0], range(4, 8), ("ep_replicate",), (R,)),
        (5, [2, 2, 2], "dp tp ep", [S2, S1, S0], range(4, 8), ("dp", "tp"), (S1, S0)),
        (5, [2, 2, 2], "dp tp ep", [S1, S0, S1], range(4), ("dp", "ep"), (S0, S0)),
    ],
)
def test_split(
    rank: int, sizes: list[int], names: str, placements: list, want: range, rest: tuple, kept: tuple
) -> None:
    with fake_rank(rank, *sizes, names=names) as mesh:
        tensor = cut(mesh, [R if isinstance(p, Partial) else p for p in placements], 8, 4, 6)
        tensor = DTensor.from_local(tensor.to_local(), mesh, placements, shape=tensor.shape, stride=tensor.stride())
        local, start, end = get_expert_slice_for_rank(tensor, 8)
        assert range(start, end) == want and local.data_ptr() == tensor.to_local().data_ptr()
        experts, ids = split_experts_weights_dtensor_aware(tensor, 8)
        assert ids == list(want)
        for i, expert in enumerate(experts):
            assert is_dtensor(expert) == (kept is not None) and expert.shape == (4, 6)
            if is_dtensor(expert):
                assert (expert.device_mesh.mesh_dim_names, expert.placements) == (rest, kept)
                expert = expert.to_local()
            assert torch.equal(expert, local[i]) and expert.data_ptr() == local[i].data_ptr()


@pytest.mark.parametrize(
    "sizes, names, placements, E, error, message",
    [
        ([2], "ep", [Partial()], 4, ValueError, "unsupported DTensor placement .*Partial.*ep=2.*expected Shard"),
        ([2], "ep", [_StridedShard(0, split_factor=2)], 4, ValueError, "unsupported DTensor placement"),
        ([2, 2], "dp ep", [S0, S0], 4, ValueError, "unsupported DTensor placement .*dp=2, ep=2.* no other Shard"),
        ([2], "ep", [S0], 9, ValueError, r"shape \(4, 2\) .*uneven parts.* shape=.*expected 9 experts"),
        ([2, 2], None, [S1, S0], 4, RuntimeError, "without mesh_dim_names"),
    ],
)
def test_no_wrong_split(sizes: list, names: str, placements: list, E: int, error: type, message: str) -> None:
    with fake_rank(1, *sizes, names=names) as mesh:
        tensor = DTensor.from_local(flat(2, 1), mesh, placements, shape=torch.Size((4, 2)), stride=(2, 1))
        with pytest.raises(error, match=message):
            split_experts_weights_dtensor_aware(tensor, E)


def test_rows_that_are_not_the_range() -> None:
    with fake_rank(0, 2, names="ep") as mesh:
        tensor = DTensor.from_local(flat(3, 2), mesh, [S0], shape=torch.Size((4, 2)), stride=(2, 1))
        with pytest.raises(ValueError, match=r"first dimension to be 2, got shape \(3, 2\)"):
            split_experts_weights_dtensor_aware(tensor, 4)


# validation


@pytest.mark.parametrize(
    "sizes, names, placements, valid",
    [
        ([2], "ep", [S0], True),
        ([2], "ep", [R], True),
        ([2], "ep", [S1], False),
        ([2], "ep", [Partial()], False),
        ([2], "dp_shard_cp", [S0], True),
        ([2], None, [S1], False),
        ([1], "dp", [S1], False),
        ([2, 2], "ep_shard ep", [S1, S0], True),
        ([2, 2], "ep_shard ep", [S1, R], True),
        ([2, 2], "ep_shard ep", [R, R], True),
        ([2, 2], "ep_shard ep", [S0, S1], False),
        ([2, 2], "ep_shard ep", [S0, R], False),
        ([2, 2], "ep_shard ep", [S0, S0], False),
        ([2, 2], "ep ep_shard", [S0, S1], True),
        ([2, 2], "ep ep_shard", [S1, S0], False),
        ([2, 2], "dp tp", [S0, S1], True),
        ([2, 2], None, [S1, S0], True),
        ([2, 2], "dp tp", [R, S1], False),
        ([2, 2], "dp tp", [S0, S0], False),
        ([2, 2], "dp ep", [Partial(), S0], False),
    ],
)
def test_validate(sizes: list[int], names: str, placements: list, valid: bool) -> None:
    with fake_rank(0, *sizes, names=names) as mesh:
        tensor = DTensor.from_local(flat(2, 2), mesh, placements, shape=torch.Size((4, 4)), stride=(4, 1))
        with pytest.raises(ValueError, match=r"gate has shape \(4, 4\).*expected 5 experts"):
            validate_dtensor_expert_sharding(tensor, 5, "gate")
        if valid:
            assert validate_dtensor_expert_sharding(tensor, 4) is True
        else:
            with pytest.raises(ValueError, match="gate has unsupported DTensor placement"):
                validate_dtensor_expert_sharding(tensor, 4, "gate")


def test_validate_plain_and_uneven() -> None:
    assert validate_dtensor_expert_sharding(flat(4, 2), 4) is True
    for wrong in (flat(4, 2), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="^tensor has shape .* expected 3 experts"):
            validate_dtensor_expert_sharding(wrong, 3)
    with fake_rank(0, 4, names="ep") as mesh, pytest.raises(ValueError, match="10 experts on 4 ranks"):
        validate_dtensor_expert_sharding(cut(mesh, [S0], 10, 2), 10)


# making DTensors


@pytest.mark.parametrize(
    "sizes, names, kept, placements, whole",
    [
        ([2], "ep", ("ep",), (S0,), (4, 4)),
        ([1, 2], "ep_shard ep", ("ep",), (S0,), (4, 4)),
        ([1, 1, 2], "ep_replicate ep_shard ep", ("ep",), (S0,), (4, 4)),
        ([2, 2], "ep_shard ep", ("ep_shard", "ep"), (S1, S0), (4, 8)),
        ([2, 2], "ep_replicate ep", ("ep_replicate", "ep"), (R, S0), (4, 4)),
        ([2, 1, 2], "ep_replicate ep_shard ep", ("ep_replicate", "ep_shard", "ep"), (R, S1, S0), (4, 4)),
        ([2], "ep_shard", ("ep_shard",), (S1,), (2, 8)),
        ([1], "ep_shard", ("ep_shard",), (S1,), (2, 4)),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_create(sizes: list, names: str, kept: tuple, placements: tuple, whole: tuple, transposed: bool) -> None:
    local = flat(2, 3, 4).mT if transposed else flat(2, 4, 3)
    with fake_rank(0, *sizes, names=names) as mesh:
        for given_shape in ({}, {"shape": (*whole, 3)}):
            tensor = create_dtensor_from_local(local, mesh, rank=0, **given_shape)
            assert (tensor.device_mesh.mesh_dim_names, tensor.placements) == (kept, placements)
            assert tensor.shape == (*whole, 3) and tensor.to_local().data_ptr() == local.data_ptr()
            dense = torch.empty(whole[0], 3, whole[1]).mT if transposed else torch.empty(*whole, 3)
            assert tensor.stride() == dense.stride()
        with pytest.raises(ValueError, match=r"shape \(2, 4, 3\), expected \(.*, this rank's of \(6, 6, 3\) on"):
            create_dtensor_from_local(local, mesh, shape=(6, 6, 3))


def test_create_refuses() -> None:
    x = flat(2, 4)
    assert create_dtensor_from_local(x, None, 0) is x
    with fake_rank(0, 2, 2, names="dp ep") as mesh, pytest.raises(ValueError, match=r"'dp', .*'ep_replicate'.* slice"):
        create_dtensor_from_local(x, mesh)
    with fake_rank(0, 2) as mesh, pytest.raises(ValueError, match=r"mesh dims named \(\), expected names among"):
        create_dtensor_from_local(x, mesh)
    with fake_rank(0, 2, 2, names="ep_shard ep") as mesh, pytest.raises(ValueError, match=r"\(2,\) has too few dims"):
        create_dtensor_from_local(flat(2), mesh)
    with fake_rank(0, 4, names="ep") as mesh, pytest.raises(ValueError, match="5 experts on 4 ranks"):
        create_dtensor_from_local(x, mesh, shape=(5, 4))


def test_a_rank_moves_to_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with fake_rank(0, 2, names="ep") as mesh:
        assert create_dtensor_from_local(flat(2), mesh, rank=7).to_local().is_meta
        assert not create_dtensor_from_local(flat(2), mesh).to_local().is_meta


def test_ep_shard_slice() -> None:
    x = flat(2, 6, 3)
    assert ep_shard_slice(x, None) is x
    for sizes, names in (([2], "ep"), ([1, 2], "ep_shard ep"), ([2], None)):
        with fake_rank(1, *sizes, names=names) as mesh:
            assert ep_shard_slice(x, mesh) is x
    with fake_rank(2, 3, 1, names="ep_shard ep") as mesh:
        part = ep_shard_slice(x, mesh)
        assert torch.equal(part, x[:, 4:]) and part.data_ptr() == x[:, 4:].data_ptr()
        for wrong in (flat(2, 4), flat(3), cut(mesh, [S1, S0], 2, 6)):
            with pytest.raises(ValueError, match=r"`ep_shard` of size 3 .* got .*Tensor of shape .*divides dim 1"):
                ep_shard_slice(wrong, mesh)


def test_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("alone", sharding.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.is_dtensor(flat(2)) and alone.validate_dtensor_expert_sharding(flat(2), 2)
    assert alone.split_experts_weights_dtensor_aware(flat(2), 2)[1] == [0, 1]
    assert alone.create_dtensor_from_local(alone.ep_shard_slice(flat(2), None), None).shape == (2,)


# real processes


def own(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """What a load does: my experts of a plain tensor, my part of dim 1, and the DTensor of these."""
    start, end = get_expert_range_for_rank_from_mesh(mesh, len(whole))
    return create_dtensor_from_local(ep_shard_slice(whole[start:end], mesh), mesh, shape=whole.shape)


def check_split(tensor: DTensor, whole: torch.Tensor, want: list[int], kept: tuple | None = None) -> None:
    """The ids are those, and each element, gathered, is its expert. Every rank of the mesh calls this."""
    experts, ids = split_experts_weights_dtensor_aware(tensor, len(whole))
    assert ids == want
    for e, expert in zip(ids, experts, strict=True):
        assert getattr(expert, "placements", None) == kept
        assert torch.equal(expert.full_tensor() if is_dtensor(expert) else expert, whole[e])


def on_two_ranks() -> list[int]:
    rank, x = dist.get_rank(), flat(4, 4, 6)
    mine = [2 * rank, 2 * rank + 1]
    ep, fsdp = (init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("ep", "dp_shard_cp"))
    for whole in (x, x.mT, x[:, 0], flat(3, 2), flat(1, 2)):
        assert torch.equal(own(whole, ep).full_tensor(), whole)
    check_split(own(x, ep), x, mine)
    check_split(own(flat(1, 2), ep), flat(1, 2), [0][rank:])
    check_split(distribute_tensor(x, fsdp, [S0]), x, mine)
    for d in (1, 2):
        check_split(distribute_tensor(x, fsdp, [Shard(d)]), x, [0, 1, 2, 3], (Shard(d - 1),))
    uneven = flat(2, 5, 3)
    check_split(distribute_tensor(uneven, fsdp, [S1]), uneven, [0, 1], (S0,))
    check_split(distribute_tensor(x.mT, ep, [R]), x.mT, [0, 1, 2, 3])
    weight = distribute_tensor(x, fsdp, [S1]).requires_grad_()
    split_experts_weights_dtensor_aware(weight, 4)[0][2].sum().backward()
    assert torch.equal(weight.grad.full_tensor().sum((1, 2)), torch.tensor([0.0, 0.0, 24.0, 0.0]))
    return mine


def on_four_ranks() -> list[str]:
    rank, x = dist.get_rank(), flat(4, 4, 6)
    mine = [2 * (rank % 2), 2 * (rank % 2) + 1]
    for names, placements, kept in ((("ep_shard", "ep"), (S1, S0), (S0,)), (("ep_replicate", "ep"), (R, S0), (R,))):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        for whole in (x, x.mT, flat(3, 2)):
            tensor = own(whole, mesh)
            assert tensor.placements == placements and torch.equal(tensor.full_tensor(), whole)
            assert validate_dtensor_expert_sharding(tensor, len(whole))
        check_split(own(x, mesh), x, mine, kept)
        check_split(own(x.mT, mesh), x.mT, mine, kept)
    three, four = (
        DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("ep",)),
        init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)),
    )
    eight, errors = flat(8, 2), []
    if rank < 3:
        assert torch.equal(own(eight, three).full_tensor(), eight)
        check_split(own(eight, three), eight, [[0, 1, 2], [3, 4, 5], [6, 7]][rank])
    else:
        with pytest.raises(ValueError, match="no one place for this process"):
            own(eight, three)
    for E in (5, 10):
        for cuts in (
            lambda w: own(w, four),
            lambda w: split_experts_weights_dtensor_aware(cut(four, [S0], *w.shape), len(w)),
        ):
            with pytest.raises(ValueError, match=f"{E} experts on 4 ranks: .*; use a size that divides {E}") as error:
                cuts(flat(E, 2))
            errors.append(str(error.value))
    return errors


def test_real_processes() -> None:
    assert distributed.run(on_two_ranks, 2) == [[0, 1], [2, 3]]
    errors = distributed.run(on_four_ranks, 4)
    assert len(errors[0]) == 4 and errors == errors[:1] * 4


def one_fails() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.barrier()


def test_processes_fail_and_hang_in_bounded_time() -> None:
    with pytest.raises(
        RuntimeError, match="(?s)one_fails on 2 ranks: rank 1 failed.*in one_fails.*KeyError: 'the cause'"
    ):
        distributed.run(one_fails, 2)
    started = time.time()
    with pytest.raises(TimeoutError, match=r"(?s)sleep on 1 ranks: ranks \[0\] .*killed"):
        distributed.run(time.sleep, 1, 60, timeout=1)
    assert time.time() - started < 10 and not multiprocessing.active_children()
