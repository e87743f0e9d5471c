"""Which experts are mine: on fake worlds of any size in this process."""

import importlib.util
import sys
from collections.abc import Sequence
from itertools import pairwise
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharding_cases import PLACEMENTS, claim, flat, seen_by
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

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

# golden vectors C4: (E, ranks) -> the balanced ranges, and where torch cuts
C4 = {
    (8, 3): ("0:3 3:6 6:8", "0:3 3:6 6:8"),
    (10, 4): ("0:3 3:6 6:8 8:10", "0:3 3:6 6:9 9:10"),
    (5, 4): ("0:2 2:3 3:4 4:5", "0:2 2:4 4:5 5:5"),
}


def cut(mesh: DeviceMesh, placements: Sequence[Placement], *shape: int) -> DTensor:
    """torch's own shards of a tensor whose values are its flat indices."""
    return distribute_tensor(flat(*shape), mesh, placements, src_data_rank=None)


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
    ours, theirs = C4[E, n]
    for rank, span in enumerate(ours.split()):
        start, end = map(int, span.split(":"))
        with seen_by(rank, f"ep*{n}=0") as (mesh, placements):
            assert get_expert_range_for_rank_from_mesh(mesh, E) == (start, end)
            tensor = cut(mesh, placements, E, 2)
            if ours == theirs:
                assert get_expert_slice_for_rank(tensor, E)[1:] == (start, end)
                continue
            for refuses in (get_expert_slice_for_rank, validate_dtensor_expert_sharding):
                with pytest.raises(ValueError) as error:
                    refuses(tensor, E)
                said = f"{E} experts on {n} ranks: expert_range {ours}, DTensor {theirs}; use a size that divides {E}"
                assert str(error.value) == said


@given(st.integers(0, 20), st.integers(1, 7))
def test_ids_are_right_or_every_rank_raises(E: int, n: int) -> None:
    seen: list[list[int] | None] = []
    for rank in range(n):
        with seen_by(rank, f"dp_shard_cp*{n}=0") as (mesh, placements):
            tensor = cut(mesh, placements, E, 1)
            try:
                experts, ids = split_experts_weights_dtensor_aware(tensor, E)
            except ValueError:
                seen.append(None)
            else:
                assert tensor.to_local().flatten().tolist() == ids == [e.item() for e in experts]
                seen.append(ids)
    assert (seen == [None] * n and E % n) or sum(seen, []) == list(range(E))


@pytest.mark.parametrize(
    "rank, mesh, E, want",
    [
        (1, "ep*4=0", 8, (2, 4)),
        (0, "ep*3=0", 8, (0, 3)),
        (2, "dp*4=0", 8, (4, 6)),
        (2, "_*4=0", 8, (4, 6)),
        (3, "ep*4=0", 2, (2, 2)),
        (1, "ep_shard*2=1 ep*2=0", 8, (4, 8)),
        (2, "ep_shard*2=1 ep*2=0", 8, (0, 4)),
    ],
)
def test_range_from_mesh(rank: int, mesh: str, E: int, want: tuple[int, int]) -> None:
    with seen_by(rank, mesh) as (device_mesh, _):
        assert get_expert_range_for_rank_from_mesh(device_mesh, E) == want
        assert [e for e in range(-1, E + 1) if should_load_expert_for_rank(e, device_mesh, E)] == list(range(*want))


def test_range_without_mesh_or_place() -> None:
    assert get_expert_range_for_rank_from_mesh(None, 8) == (0, 8)
    assert should_load_expert_for_rank(7, None, 8) and not should_load_expert_for_rank(8, None, 8)
    asked = MagicMock(mesh_dim_names=("dp", "ep"))
    asked.__getitem__.return_value = MagicMock(**{"size.return_value": 4, "get_local_rank.return_value": 1})
    assert get_expert_range_for_rank_from_mesh(asked, 8) == (2, 4)
    asked.__getitem__.assert_called_once_with(("ep",))
    with seen_by(3, "dp*2=0 cp*2=0") as (mesh, _):
        with pytest.raises(ValueError, match="no one place .*dp=2, cp=2.* must be 1-D or have `ep`"):
            get_expert_range_for_rank_from_mesh(mesh, 8)
        with pytest.raises(ValueError, match="no one place for this process in .*ep=3"):
            get_expert_range_for_rank_from_mesh(DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("ep",)), 8)
        assert get_submesh(mesh, ("cp",)).get_local_rank() == 1
        with pytest.raises(KeyError, match="nope"):
            get_submesh(mesh, ("nope",))


def test_plain_tensors() -> None:
    x = flat(4, 2)
    local, *bounds = get_expert_slice_for_rank(x, 9)
    assert local is x and bounds == [0, 9] and not is_dtensor(x)
    experts, ids = split_experts_weights_dtensor_aware(x, 4)
    assert ids == [0, 1, 2, 3] and all(e.data_ptr() == x[i].data_ptr() for i, e in enumerate(experts))
    assert validate_dtensor_expert_sharding(x, 4) is True
    for wrong in (x, torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match="Expected local tensor first dimension to be 9, got shape .* all 9 experts"
        ):
            split_experts_weights_dtensor_aware(wrong, 9)
        with pytest.raises(ValueError, match="^tensor has shape .* expected 9 experts"):
            validate_dtensor_expert_sharding(wrong, 9)


@pytest.mark.parametrize(
    "rank, mesh, want, rest, kept",
    [
        (1, "ep*4=0", range(2, 4), None, None),
        (2, "dp_shard_cp*4=0", range(4, 6), None, None),
        (2, "_*4=0", range(4, 6), None, None),
        (1, "ep*4=R", range(8), None, None),
        (1, "dp*4=R", range(8), ("dp",), "R"),
        (1, "ep*4=1", range(8), ("ep",), "0"),
        (1, "_*4=2", range(8), None, "1"),
        (1, "ep_shard*2=1 ep*2=0", range(4, 8), ("ep_shard",), "0"),
        (2, "ep_shard*2=1 ep*2=0", range(4), ("ep_shard",), "0"),
        (1, "ep_shard*2=2 ep*2=R", range(8), ("ep_shard",), "1"),
        (1, "ep_shard*2=1 ep*1=0", range(8), ("ep_shard",), "0"),
        (1, "ep_shard*1=1 ep*2=0", range(4, 8), None, None),
        (1, "dp*1=0 ep*2=0", range(4, 8), None, None),
        (1, "dp*1=P ep*2=0", range(4, 8), None, None),
        (3, "ep_replicate*2=R ep*2=0", range(4, 8), ("ep_replicate",), "R"),
        (5, "dp*2=2 tp*2=1 ep*2=0", range(4, 8), ("dp", "tp"), "10"),
        (5, "dp*2=1 tp*2=0 ep*2=1", range(4), ("dp", "ep"), "00"),
    ],
)
def test_split(rank: int, mesh: str, want: range, rest: tuple | None, kept: str | None) -> None:
    with seen_by(rank, mesh) as (device_mesh, placements):
        local = cut(device_mesh, [PLACEMENTS["R"] if p.is_partial() else p for p in placements], 8, 4, 6).to_local()
        tensor = claim(device_mesh, placements, local, 8, 4, 6)
        alias, start, end = get_expert_slice_for_rank(tensor, 8)
        experts, ids = split_experts_weights_dtensor_aware(tensor, 8)
        assert alias.data_ptr() == local.data_ptr() and range(start, end) == want and ids == list(want)
        for i, expert in enumerate(experts):
            assert is_dtensor(expert) == (kept is not None) and expert.shape == (4, 6)
            if is_dtensor(expert):
                assert expert.device_mesh.mesh_dim_names == rest
                assert list(expert.placements) == [PLACEMENTS[k] for k in kept]
                expert = expert.to_local()
            assert torch.equal(expert, local[i]) and expert.data_ptr() == local[i].data_ptr()


@pytest.mark.parametrize(
    "mesh, E, error, message",
    [
        ("ep*2=P", 4, ValueError, "unsupported DTensor placement .*Partial.*ep=2.*redistribute it to Shard"),
        ("ep*2=strided", 4, ValueError, "unsupported DTensor placement"),
        ("dp*2=0 ep*2=0", 4, ValueError, "unsupported DTensor placement .*dp=2, ep=2.* no other Shard"),
        ("ep*2=0", 9, ValueError, r"shape \(4, 2\) .*uneven parts.* shape=.*expected 9 experts"),
        ("dp*2=R", 4, ValueError, r"first dimension to be 4, got shape \(2, 1\)"),
        ("_*2=1 _*2=0", 4, RuntimeError, "without mesh_dim_names"),
    ],
)
def test_no_wrong_split(mesh: str, E: int, error: type[Exception], message: str) -> None:
    with seen_by(1, mesh) as (device_mesh, placements), pytest.raises(error, match=message):
        split_experts_weights_dtensor_aware(claim(device_mesh, placements, flat(2, 1), 4, 2), E)


def test_only_the_experts_follow_our_rule() -> None:
    # ten columns on four ranks: 3 3 3 1, as DTensor cuts them; ten experts would be refused
    with seen_by(3, "ep_shard*4=1") as (mesh, _):
        assert create_dtensor_from_local(flat(2, 1), mesh, shape=(2, 10)).shape == (2, 10)


def test_a_rank_moves_to_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    with seen_by(0, "ep*2=0") as (mesh, _):
        assert create_dtensor_from_local(flat(2), mesh, rank=7).to_local().is_meta
        assert not create_dtensor_from_local(flat(2), mesh).to_local().is_meta


def test_ep_shard_slice() -> None:
    x = flat(2, 6, 3)
    assert ep_shard_slice(x, None) is x
    for mesh in ("ep*2=0", "ep_shard*1=1 ep*2=0", "_*2=0"):
        with seen_by(1, mesh) as (device_mesh, _):
            assert ep_shard_slice(x, device_mesh) is x
    with seen_by(2, "ep_shard*3=1 ep*1=0") as (device_mesh, placements):
        part = ep_shard_slice(x, device_mesh)
        assert torch.equal(part, x[:, 4:]) and part.data_ptr() == x[:, 4:].data_ptr()
        for wrong in (flat(2, 4), flat(3), cut(device_mesh, placements, 2, 6)):
            with pytest.raises(ValueError, match=r"`ep_shard` of size 3 .* got .*Tensor of shape .*divides dim 1"):
                ep_shard_slice(wrong, device_mesh)


def test_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("alone", sharding.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not alone.is_dtensor(flat(2)) and alone.validate_dtensor_expert_sharding(flat(2), 2)
    assert alone.split_experts_weights_dtensor_aware(flat(2), 2)[1] == [0, 1]
    assert alone.create_dtensor_from_local(alone.ep_shard_slice(flat(2), None), None).shape == (2,)
