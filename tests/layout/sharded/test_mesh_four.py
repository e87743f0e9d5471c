"""`from_hf(hf, device_mesh=...)` and DTensors both ways, on four real gloo processes: uneven, moved, gathered."""

from itertools import product

import distributed
import hf_synthetic as synthetic
import pytest
import torch
from mesh_cases import BLOCK, gathered, hf_tensors, quietly, shares, whole_of
from test_placements import cut
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fmoe
from fmoe.layout.sharded.placements import cuts_of, gathers
from fmoe.testing import same


def uneven_splits(mesh: DeviceMesh) -> None:
    config, tensors = synthetic.qwen3_5_moe()  # 6 experts on 4 ranks: DTensor would cut 2, 2, 2, 0
    with pytest.raises(ValueError, match="6 experts on 4 ranks"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(tensors, mesh)
    hf, adapter = hf_tensors(E=2), fmoe.adapter("per_expert")
    mine = adapter.from_hf(hf, mesh)  # some ranks may have no expert
    assert mine[f"{BLOCK}down_projs"].to_local().shape[0] == (1 if mesh.get_rank() < 2 else 0)
    same(gathered(mine), adapter.from_hf(hf))
    same(back := adapter.to_hf(mine), {n: hf[n] for n in back})
    assert len(back) == (3 if mesh.get_rank() < 2 else 0)
    beside = adapter | fmoe.keep("visual.{rest}")  # a family with more beside it is cut all the same
    assert len(beside.plan(hf).copies) == len(adapter.plan(hf).copies) == 6
    again = beside.from_hf(hf | {"visual.w": torch.ones(3)}, mesh)
    same({n: t.to_local() for n, t in again.items() if n in mine}, {n: t.to_local() for n, t in mine.items()})


def placements_move_with_their_axes(mesh: DeviceMesh) -> None:
    """(ep_shard, ep): what is fused goes on both dims, one by one on ep_shard, and from there back on both."""
    config, tensors = synthetic.qwen3_5_moe()
    adapter = fmoe.adapter("qwen3_5_moe", config)
    sharded = {
        n: distribute_tensor(t, mesh, [Shard(1), Shard(0)]) if t.ndim == 3 and "experts" in n else t
        for n, t in tensors.items()
    }
    for native in (quietly(adapter.from_hf, sharded), quietly(adapter.from_hf, sharded, mesh)):  # cut no second time
        key = "model.language_model.layers.0.mlp.experts.gate_and_up_projs"
        assert native[key].placements == (Shard(2), Shard(0))
        same(gathered(native), adapter.from_hf(tensors))
        back = quietly(adapter.to_hf, native)
        assert all(back[n].placements == t.placements for n, t in sharded.items() if isinstance(t, DTensor))
    split = fmoe.adapter("qwen3_5_moe", config, layout="per_expert", mtp_layout="per_expert")
    with pytest.raises(fmoe.AdapterError, match="cuts|across more than one axis"):  # gate on one rank, up on the other,
        thirds = [_StridedShard(2, split_factor=3), Shard(0)]
        split.to_hf({key: cut(adapter.from_hf(tensors)[key], mesh, thirds)})
    hf = hf_tensors()
    adapter, ep_shard = fmoe.adapter("per_expert"), mesh["ep_shard"]
    narrow = {n: distribute_tensor(t, ep_shard, [Shard(1)], src_data_rank=None) for n, t in hf.items()}
    native = quietly(adapter.from_hf, narrow, mesh)
    assert {tuple(t.placements) for t in native.values()} == {(Shard(1), Shard(0))}
    same(gathered(native), adapter.from_hf(hf))
    back = quietly(adapter.to_hf, native)
    assert len(back) == len(hf) / 2 and all(t.device_mesh == ep_shard for t in back.values())
    same(gathered(back), {n: hf[n] for n in back})
    fsdp = {n: distribute_tensor(t, mesh, [Shard(0), Replicate()]) for n, t in hf.items()}
    native = quietly(adapter.from_hf, fsdp, mesh)  # copies along `ep` are cut there
    assert native[f"{BLOCK}down_projs"].placements == (Shard(2), Shard(0))
    same(gathered(native), adapter.from_hf(hf))
    down = {n: distribute_tensor(t, mesh, [Shard(0), Shard(0)]) for n, t in hf.items() if "down" in n}
    rule = fmoe.rule("{pre}experts.{e}.down_proj.weight [d i]", "{pre}experts.down_projs [e i d]")
    native = quietly(rule.from_hf, down, mesh)  # and what `ep` cuts already stays as it is
    assert native[f"{BLOCK}down_projs"].placements == (Shard(2), Shard(2))
    same(gathered(native), rule.from_hf({n: hf[n] for n in down}))


def torch_gathers_what_we_make(mesh: DeviceMesh) -> None:
    """torch's own way back of two cuts of one dimension; it is wrong, or raises, for two strided ones."""
    x, kinds = torch.arange(96.0), [Shard(0), *(_StridedShard(0, split_factor=n) for n in (2, 3, 4, 6))]
    for a, b in product(kinds, kinds):
        tensor = cut(x, mesh, [a, b])
        if gathers([c for _, c in cuts_of(tensor)]):
            assert torch.equal(whole_of(tensor), x), (a, b)
    hf = {f"x.{g}": cut(torch.arange(96.0).view(48, 2), mesh, [Shard(0), Shard(0)]) for g in range(2)}
    with pytest.raises(fmoe.AdapterError, match="which torch gathers in another order"):
        fmoe.rule("x.{g} [i d]", "y [d (g i)]", g=2).from_hf(hf)
    same(
        gathered(fmoe.rule("x.{g} [i d]", "y [g d i]").from_hf(hf)),
        {"y": torch.stack([t.full_tensor().T for t in hf.values()])},
    )


def on_four_ranks() -> None:
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    uneven_splits(four)
    meshes = {names: init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
              for names in (("ep_shard", "ep"), ("ep_replicate", "ep"))}  # fmt: skip
    for mesh in meshes.values():
        shares(mesh)
    placements_move_with_their_axes(meshes["ep_shard", "ep"])
    torch_gathers_what_we_make(meshes["ep_shard", "ep"])


def test_four_ranks():
    distributed.run(on_four_ranks, 4)
