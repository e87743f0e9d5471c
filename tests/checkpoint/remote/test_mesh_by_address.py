"""Sharded parameters from an address: each of two ranks takes its own experts, and asks for its own bytes alone."""

from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from command import demo
from servers import serving
from torch.distributed.device_mesh import init_device_mesh

import fmoe
import fmoe.dcp
from fmoe.testing import same


def local(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: t.to_local() if hasattr(t, "to_local") else t for n, t in params.items()}


def load_twice(url: str, path: Path) -> int:
    """By `load` and, in place, by `dcp.load`; how many bytes of tensors this rank has."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    here = fmoe.load(path, device_mesh=mesh)
    there = fmoe.load(url, device_mesh=mesh)
    same(local(there), local(here))
    for tensor in local(there).values():
        tensor.fill_(7)
    fmoe.dcp.load(there, url)
    same(local(there), local(here))
    return sum(t.nbytes for t in local(here).values())


@pytest.mark.parametrize("made", ["hf", "native"])
def test_two_ranks_load_their_own_experts_from_an_address(made, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    path = demo() / made
    with serving(path) as server:
        owned = distributed.run(load_twice, 2, server.url, path)
        headers = 2 * 2 * sum(2**16 for _ in path.glob("*.safetensors"))  # of two ranks, by two calls
        assert server.data <= 2 * 1.02 * sum(owned) + headers
