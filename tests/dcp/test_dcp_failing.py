"""Two real ranks save together, and one fails or dies: both end soon, told which one it was, and nothing is half."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from directories import files
from failing import chosen, failing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fmoe
import fmoe.dcp
from fmoe import AdapterError
from fmoe.dcp.boxes import alive

RULES = fmoe.rule("layers.{l}.w.{e} [i d]", "layers.{l}.w [e d i]") | fmoe.keep("{rest}")
PARAMS = {"layers.0.w": torch.arange(24.0).view(2, 3, 4), "layers.1.w": torch.ones(2, 3, 4), "norm": torch.ones(3)}
SOON = 20  # seconds


def saver() -> Callable[[Path], int]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    cut = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if t.ndim == 3 else t
    params = {n: cut(t) for n, t in PARAMS.items()}
    return lambda path: fmoe.dcp.save(params, path, RULES, max_shard_size=60)


def each_call_of_each_rank_fails(folder: Path) -> int:
    rank, save, tried = dist.get_rank(), saver(), 0
    with failing(folder, None) as mine:
        save(folder / "new")
    everybody: list[Any] = [None, None]
    dist.all_gather_object(everybody, mine)
    new = files(folder / "new")
    for victim, calls in enumerate(everybody):
        for at in (i for i in chosen(calls) if not calls[i].startswith("mkdir")):  # of what is there already
            dst, code = folder / f"{victim} {at}", (errno.EIO, errno.ENOSPC, errno.ESTALE)[at % 3]
            began = time.monotonic()
            with pytest.raises(AdapterError) as error, failing(folder, at if rank == victim else None, code):
                save(dst)
            assert time.monotonic() - began < SOON
            assert f"rank {victim}: OSError" in str(error.value) and str(folder) in str(error.value), (
                calls[at],
                error.value,
            )
            dist.barrier()  # until the first rank has cleared away
            if dst.exists():
                with pytest.raises(AdapterError, match="is unfinished"):
                    fmoe.inspect(dst)
            dist.barrier()
            save(dst)
            assert files(dst) == new, calls[at]
            dist.barrier()
            tried += 1
    return tried


def fails_and_dies(folder: Path, victim: int) -> tuple[int, str]:
    return each_call_of_each_rank_fails(folder) if victim else 0, one_dies(folder, victim)


def one_dies(folder: Path, victim: int) -> str:
    save = saver()
    if dist.get_rank() == victim:
        os.pwrite = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(AdapterError) as error:
        save(folder / "dst")
    assert time.monotonic() - began < SOON
    return str(error.value)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_ranks_of_which_one_fails_and_then_dies(victim, tmp_path):
    tried, told = distributed.run(fails_and_dies, 2, tmp_path, victim, dies=[victim])[1 - victim]
    assert tried >= 25 * victim and f"rank {victim} has ended" in told and "run this again on all ranks" in told
    dst = tmp_path / "dst"
    assert dst.exists() == (victim == 0)  # what the first rank alone can clear away
    if dst.exists():
        with pytest.raises(AdapterError, match="is unfinished"):
            fmoe.inspect(dst)
    fmoe.dcp.save(PARAMS, dst, RULES, max_shard_size=60)
    fmoe.save(PARAMS, tmp_path / "one", RULES, max_shard_size=60)
    assert files(dst) == files(tmp_path / "one")


OWN, GROUPS = RuntimeError("w: a size of 3"), dist.DistNetworkError("x] Connection reset")
RANKS = [(OWN, 2, False), (GROUPS, 1, False), (GROUPS, 3, True), (RuntimeError("gloo: x"), 2, True)]


@pytest.mark.parametrize(("error", "ranks", "told"), RANKS, ids=str)
def test_a_rank_is_said_to_be_gone_for_what_its_group_says_alone(error, ranks, told, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    with pytest.raises(RuntimeError if not told else AdapterError) as raised, alive(None):
        raise error
    assert (raised.value is error) != told
    assert not told or ("rank 1 has ended" if ranks == 2 else "one of the ranks [1, 2] has ended") in str(raised.value)


def test_what_the_system_says_of_a_file_is_told_with_what_to_do(tmp_path):
    """In one process as `fmoe.save` tells it: an OSError too, with its number and its file."""
    save = lambda path: fmoe.dcp.save(PARAMS, path, RULES, max_shard_size=60)
    with failing(tmp_path, None) as calls:
        save(tmp_path / "new")
    tried = [i for i in chosen(calls) if not calls[i].startswith("mkdir")]
    for at in tried:
        with pytest.raises(AdapterError) as error, failing(tmp_path, at, errno.ENOSPC):
            save(tmp_path / str(at))
        told = error.value
        assert isinstance(told, OSError) and told.errno == errno.ENOSPC and str(tmp_path) in str(told), calls[at]
        assert str(told).endswith("Fix: make room, then run it again"), calls[at]
    assert len(tried) > 20
