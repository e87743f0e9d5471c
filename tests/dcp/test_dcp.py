"""Sharded parameters and files: loaded and saved on real processes, on every kind of mesh, each rank its own bytes."""

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from directories import files, fill
from directories import load as read
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import fmoe
import fmoe.dcp
from fmoe.testing import same

NAMES = ["qwen3_moe-bfloat16", "synthetic-qwen3_5_moe", "synthetic-deepseek_v3_fp8", "gpt_oss-float32"]


def part(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def blank(params: dict[str, Any]) -> dict[str, Any]:
    made = {n: t.clone() for n, t in params.items()}
    for tensor in made.values():
        part(tensor).fill_(7)
    return made


def check(params: dict[str, Any], expected: dict[str, Any]) -> None:
    assert all(getattr(params[n], "placements", 0) == getattr(t, "placements", 0) for n, t in expected.items())
    same({n: part(t) for n, t in params.items()}, {n: part(t) for n, t in expected.items()})


def sharded(params: dict[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, Any]:
    """As FSDP has it: everything cut in dim 0 that has one."""
    return {n: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if t.ndim else t for n, t in params.items()}


def meshes_of_four() -> dict[str, DeviceMesh]:
    shapes = {"ep": (4,), "ep_shard ep": (2, 2), "ep_replicate ep": (2, 2), "dp": (4,)}
    made = {t: init_device_mesh("cpu", shape, mesh_dim_names=tuple(t.split())) for t, shape in shapes.items()}
    made["two"] = DeviceMesh("cpu", [0, 1], mesh_dim_names=("ep",))
    return made


def every_mesh(folder: Path) -> None:
    """What is loaded is from_hf's, and what is saved the same files, on every mesh; rank 0 and 1 alone, too."""
    rank, meshes, pair = dist.get_rank(), meshes_of_four(), dist.new_group([0, 1])
    for name in NAMES:
        path = folder / name / "hf"
        adapter, hf = fmoe.adapter(path), read(path)
        whole = adapter.from_hf(hf)
        for label, mesh in meshes.items():
            group = pair if label == "two" else None
            if group and rank > 1 or label == "ep" and name == "synthetic-qwen3_5_moe":  # 6 experts on 4 ranks
                continue
            expected = sharded(whole, mesh) if label == "dp" else adapter.from_hf(hf, mesh)
            if not group and (label, name) != ("dp", "synthetic-qwen3_5_moe"):
                check(fmoe.load(path, device_mesh=mesh), adapter.from_hf(hf, mesh))
            params = blank(expected)
            fmoe.dcp.load(params, path, process_group=group)
            check(params, expected)
            if "fp8" in name and label in ("dp", "ep_shard ep"):  # cut inside the blocks that have one scale
                with pytest.raises(fmoe.AdapterError, match="whole blocks of 128") as error:
                    fmoe.dcp.save(params, folder / name / "none", adapter, process_group=group)
                dist.barrier()  # until the first rank has cleared away
                assert error.value.keys and not (folder / name / "none").exists()
                fmoe.dcp.save(params, folder / name / label, adapter, "native", fsync=False, process_group=group)
            else:
                size = dict(max_shard_size=100_000, fsync=label == "ep", process_group=group)
                fmoe.dcp.save(params, folder / name / label, adapter, **size)
        dist.barrier()
        for label, other in (("two", "ep"), ("dp", "two"), ("ep_shard ep", "two"), ("two", "ep_shard ep")):
            if other == "ep" and name == "synthetic-qwen3_5_moe" or other == "two" and rank > 1:
                continue
            expected = adapter.from_hf(hf, meshes[other])  # saved on as many ranks, loaded on others
            params = blank(expected)
            fmoe.dcp.load(params, folder / name / label, process_group=pair if other == "two" else None)
            check(params, expected)


def what_is_wrong_is_told_on_all(folder: Path) -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    path = folder / NAMES[0] / "hf"
    adapter, good = fmoe.adapter(path), fmoe.load(path, device_mesh=mesh)
    key = next(n for n in good if n.endswith("down_projs"))
    before = files(path)

    refused = partial(pytest.raises, fmoe.AdapterError)
    wrong = good | {key: good[key].float()} if rank == 2 else good
    with refused(match="params has .*float32, expected .*bfloat16") as error:
        fmoe.dcp.load(wrong, path)
    assert error.value.keys == (key,)
    with refused(match="params has no .*down_projs") as error:
        fmoe.dcp.load({n: t for n, t in good.items() if n != key}, path)
    assert error.value.keys == (key,)
    total = DTensor.from_local(torch.zeros(good[key].shape, dtype=torch.bfloat16), mesh, [Partial()])
    with refused(match="expected no sum"):
        fmoe.dcp.load(good | {key: total}, path)
    with refused(match="is not there"):
        fmoe.dcp.load(good, folder / "nowhere")
    with refused(match="which family"), fmoe.dcp.surfacing():
        torch_dcp.load({}, storage_reader=torch_dcp.HuggingFaceStorageReader(str(path)), planner=fmoe.dcp.Planner(good))
    with refused(match=r"ranks \[1\] hold other names"):
        fmoe.dcp.save(good | {"more": torch.ones(1)} if rank == 1 else good, folder / "odd", adapter)
    with refused(match="is not empty"):
        fmoe.dcp.save(good, path, adapter)
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with refused(match="rank 3: OSError: .*No space left"), mock.patch("os.pwrite", full if rank == 3 else os.pwrite):
        fmoe.dcp.save(good, folder / "full", adapter)
    dist.barrier()
    assert not (folder / "full").exists() and not (folder / "odd").exists() and files(path) == before
    params = blank(good)
    planner = fmoe.dcp.Planner(params, adapter)  # torch's own reader gives the same, of what is not decoded
    torch_dcp.load({}, storage_reader=torch_dcp.HuggingFaceStorageReader(str(path)), planner=planner)
    check(params, good)


def four(folder: Path) -> None:
    every_mesh(folder)
    what_is_wrong_is_told_on_all(folder)


def test_four_ranks(tmp_path):
    for name in NAMES:
        fill(tmp_path / name / "hf", name)
    distributed.run(four, 4, tmp_path, timeout=240)
    for name in NAMES:
        path = tmp_path / name / "hf"
        fmoe.save(fmoe.load(path), tmp_path / name / "plain", fmoe.adapter(path), max_shard_size=100_000)
        made = [p for p in (tmp_path / name).iterdir() if p.name not in ("hf", "plain")]
        made = [p for p in made if not (p / "fmoe.json").exists()]
        assert len(made) == 5 - (name == "synthetic-qwen3_5_moe") - 2 * ("fp8" in name)
        for out in made:
            assert files(out) == files(tmp_path / name / "plain"), out


@pytest.mark.parametrize("name", [*NAMES, "synthetic-step3p5"])
def test_one_process_needs_no_group(name, tmp_path):
    path = fill(tmp_path / "of", name)
    expected = fmoe.load(path)
    params = blank(expected)
    fmoe.dcp.load(params, path)
    same(params, expected)
    for layout in ("hf", "native"):
        fmoe.dcp.save(params, tmp_path / layout, fmoe.adapter(path), layout, 100_000)
        fmoe.save(params, tmp_path / f"{layout}2", fmoe.adapter(path), layout, 100_000)
        assert files(tmp_path / layout) == files(tmp_path / f"{layout}2")
        again = blank(expected)
        fmoe.dcp.load(again, tmp_path / layout)
        same(again, expected)
