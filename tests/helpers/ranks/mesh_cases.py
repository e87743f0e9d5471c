"""This rank's share of every family's tensors, and what it gathers to."""

from typing import Any

import hf_synthetic as synthetic
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

import fmoe
from fmoe.layout.sharded.placements import indices_of
from fmoe.testing import same

SOURCES = {"qwen3_5_moe": synthetic.qwen3_5_moe, "deepseek_v3": synthetic.deepseek_v3, "step3p5": synthetic.step3p5}
SOURCES["deepseek_v3 fp8"] = synthetic.deepseek_v3_fp8
BLOCK = "model.layers.0.mlp.experts."


def gathered(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: whole_of(t) if isinstance(t, DTensor) else t for n, t in params.items()}


def whole_of(tensor: DTensor) -> torch.Tensor:
    try:
        return tensor.full_tensor()
    except ValueError:  # torch 2.11 puts strided shards together for FSDP only, and refuses others: by hand
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, ([list(i) for i in indices_of(tensor)], tensor.to_local()))
        out = torch.zeros(tensor.shape, dtype=tensor.dtype)
        for indices, local in found:
            out[torch.meshgrid(*map(torch.tensor, indices), indexing="ij")] = local
        return out


def quietly(convert: Any, *args: Any, **how: Any) -> dict[str, Any]:
    """convert(...), which does not communicate."""
    with CommDebugMode() as comm:
        made = convert(*args, **how)
    assert comm.get_total_counts() == 0
    return made


def shares(mesh: DeviceMesh) -> None:
    """This rank's share of every family's tensors, gathered, is the whole; and so is what goes back."""
    names = mesh.mesh_dim_names
    for name, make in SOURCES.items():
        config, tensors = make()
        adapter = fmoe.adapter(name.split()[0], config)
        whole, mine = adapter.from_hf(tensors), quietly(adapter.from_hf, tensors, mesh)
        assert mine.keys() == whole.keys()
        for key, tensor in mine.items():
            expert = key.endswith(("gate_and_up_projs", "down_projs")) or "_projs_scale" in key
            assert isinstance(tensor, DTensor) == expert, key
            if expert and "ep" in names:
                held = 1 if all(mesh[n].size() == 1 for n in names if n != "ep") else len(names)
                assert len(tensor.placements) == held and tensor.placements[-1] == Shard(0)
        same(gathered(mine), whole)
        settled, narrow = adapter.resolve(tensors), "ep_shard" in names and mesh["ep_shard"].size() > 1
        if "fp8" in name and narrow:  # these experts are smaller than the blocks that have one scale
            with pytest.raises(fmoe.AdapterError, match="each part whole blocks of 128"):
                settled.to_hf(mine)
            settled = settled.choose(quantization=False)
            tensors = settled.to_hf(whole)
        back = quietly(settled.to_hf, mine)  # this rank's experts, under their own numbers
        same(gathered(back), {n: tensors[n] for n in back})
        assert any(isinstance(t, DTensor) for t in back.values()) == (
            "step3p5" in name or narrow or "ep_replicate" in names or "qwen3_5" in name
        )
        own = [n for n in tensors if ".experts." in n and n not in back]
        cut = "ep" in names and mesh["ep"].size() > 1 or names == ("dp",)
        assert bool(own) == (cut and any(".experts.0." in n for n in tensors)), own
        one = next(n for n in mine if n.endswith("down_projs"))
        assert dict(settled.convert_single_tensor_to_hf(one, mine[one])).keys() <= tensors.keys() or "fp8" in name


def hf_tensors(E: int = 4, I: int = 6, D: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"gate": (I, D), "up": (I, D), "down": (D, I)}
    return {f"{BLOCK}{e}.{p}_proj.weight": torch.randn(s) for e in range(E) for p, s in shapes.items()}
