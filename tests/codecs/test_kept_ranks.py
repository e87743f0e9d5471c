"""Kept codes on ranks: of every format, DTensors give what plain tensors give, gathered, or are refused by name."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import codec_cases
import foreign_cases
import pytest
import stack_cases
import threads
import torch
import torch.distributed as dist
from mesh_cases import gathered
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fmoe
from fmoe.codecs.formats import FORMATS as TABLE
from fmoe.testing import same

D, I = 128, 128
OWN = {fmt: family for family, fmt in reversed(codec_cases.CASES)}
FORMATS = {n: f for n, f in TABLE.items() if n != "fp8 qscale"}  # which no family's files have
KIND = "words zeros form lone stack rank grouped transposed across third shape order".split()
FIRST = {tuple(getattr(f, n) for n in KIND) + (bool(f.second),): name for name, f in reversed(FORMATS.items())}
EVERY = [n if n in FIRST.values() else pytest.param(n, marks=pytest.mark.slow) for n in FORMATS]
"""One for each way that parts are stored; the others, which are the same program, when there is time."""


def checkpoint(fmt: str) -> tuple[fmoe.Adapter, dict[str, Tensor]]:
    if fmt in OWN:
        return codec_cases.made((OWN[fmt], fmt), D, I, quantized="keep")
    if fmt == "mxfp8 .scale":
        torch.manual_seed(0)
        hf = codec_cases.per_expert(codec_cases.V4, fmt, codec_cases.W123, D, I)
        return fmoe.adapter("deepseek_v4", codec_cases.config("deepseek_v4", D, I), quantized="keep").resolve(hf), hf
    cases, family = (stack_cases, stack_cases.FAMILIES[fmt][0]) if TABLE[fmt].stack else (foreign_cases, "qwen3_moe")
    with patch.object(cases, "by_hand", lambda f, codes, scale: codes):  # what they say is no matter here
        config, hf, _ = cases.checkpoint(family, fmt)
    return fmoe.adapter(family, config, quantized="keep").resolve(hf), hf


def cut(params: dict[str, Tensor], mesh: DeviceMesh, dim: int) -> dict[str, Any]:
    """Tensors of experts cut along a dim that they have, others whole, all as DTensors. torch cuts no e8m0 unevenly."""
    even = lambda n, t: "experts." in n and t.ndim >= -dim and t.shape[dim] % mesh.size() == 0
    return {
        n: distribute_tensor(t, mesh, [Shard(t.ndim + dim) if even(n, t) else Replicate()]) for n, t in params.items()
    }


def outcomes(adapter: fmoe.Adapter, hf: dict[str, Tensor], native: dict[str, Tensor]) -> Iterator[str]:
    """How it went, for each way to cut: equal, or refused with the names."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    for made, want, convert in ((hf, native, adapter.from_hf), (native, hf, adapter.to_hf)):
        for dim in (-1, -2):
            try:
                found = convert(cut(made, mesh, dim))
            except fmoe.AdapterError as error:
                assert error.keys and all("experts" in key for key in error.keys)
                yield "refused"
                continue
            whole = gathered(found)
            same(whole, {n: want[n] for n in whole})
            held: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(held, [*whole])
            assert set().union(*held) == set(want)
            yield "equal"


def ep(adapter: fmoe.Adapter, hf: dict[str, Tensor], native: dict[str, Tensor]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    mine = adapter.from_hf(hf, mesh)
    stacks = {n for n, t in native.items() if t.ndim and len(t) == codec_cases.E and n.endswith(("projs", "second"))}
    assert all(isinstance(mine[n], DTensor) and mine[n].placements == (Shard(0),) for n in stacks)
    same(gathered(mine), native)
    back, held = adapter.to_hf(mine), [None] * dist.get_world_size()
    same(gathered(back), {n: hf[n] for n in back})
    dist.all_gather_object(held, [*back])
    assert set().union(*held) == set(hf)


@pytest.mark.parametrize("fmt", EVERY)
def test_kept_codes_on_ranks_are_those_of_one_process_or_refused(fmt: str) -> None:
    adapter, hf = checkpoint(fmt)
    native = adapter.from_hf(hf)
    threads.run(ep, 3, adapter, hf, native)
    told = threads.run(lambda: [*outcomes(adapter, hf, native)], 2)
    moved = not (TABLE[fmt].words or TABLE[fmt].zeros or TABLE[fmt].shape)  # what is packed anew is whole
    assert told[0] == told[1] == (["equal"] * 4 if moved else told[1])
