"""`from_hf(hf, device_mesh=...)` on real gloo processes: this rank's experts, as DTensors of the whole."""

import distributed
import hf_synthetic as synthetic
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fmoe
from fmoe.testing import same

SOURCES = {"qwen3_5_moe": synthetic.qwen3_5_moe, "deepseek_v3": synthetic.deepseek_v3, "step3p5": synthetic.step3p5}
SOURCES["deepseek_v3 fp8"] = synthetic.deepseek_v3_fp8


def shares(shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for name, make in SOURCES.items():
        config, tensors = make()
        adapter = fmoe.adapter(name.split()[0], config)
        whole, mine = adapter.from_hf(tensors), adapter.from_hf(tensors, mesh)
        assert mine.keys() == whole.keys()
        for key, tensor in mine.items():
            expert = key.endswith(("gate_and_up_projs", "down_projs")) or "_projs_scale" in key
            assert isinstance(tensor, DTensor) == expert, key
        same({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in mine.items()}, whole)
        if name == "step3p5":  # halves of a DTensor of all experts: not yet
            with pytest.raises(fmoe.AdapterError, match="a DTensor, and more than whole dimensions would move"):
                adapter.to_hf(mine)
        elif "ep_shard" not in names or shape[0] == 1:
            back = adapter.resolve(tensors).to_hf(mine)  # this rank's experts, under their own numbers
            same(
                {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in back.items()},
                {n: tensors[n] for n in back},
            )
            own = [n for n in tensors if ".experts." in n and n not in back]
            assert bool(own) == (mesh["ep"].size() > 1 and any(".experts.0." in n for n in tensors)), own
            one = next(n for n in mine if n.endswith("down_projs"))
            assert dict(adapter.convert_single_tensor_to_hf(one, mine[one])).keys() <= tensors.keys() or "fp8" in name


def ranks_of_an_uneven_split() -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    config, tensors = synthetic.qwen3_5_moe()  # 6 experts on 4 ranks: DTensor would cut 2, 2, 2, 0
    with pytest.raises(ValueError, match="6 experts on 4 ranks"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(tensors, mesh)


def whole_dimensions_of_dtensors_move() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep_shard", "ep"))
    config, tensors = synthetic.qwen3_5_moe()
    adapter = fmoe.adapter("qwen3_5_moe", config)
    sharded = {
        n: distribute_tensor(t, mesh, [Shard(1), Shard(0)]) if t.ndim == 3 and "experts" in n else t
        for n, t in tensors.items()
    }
    native = adapter.from_hf(sharded)
    key = "model.language_model.layers.0.mlp.experts.gate_and_up_projs"
    assert native[key].placements == (Shard(2), Shard(0))
    same({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in native.items()}, adapter.from_hf(tensors))
    back = adapter.to_hf(native)
    assert all(back[n].placements == t.placements for n, t in sharded.items() if isinstance(t, DTensor))
    split = fmoe.adapter("qwen3_5_moe", config, layout="per_expert", mtp_layout="per_expert")
    with pytest.raises(fmoe.AdapterError, match="cut on more than its experts") as error:
        split.to_hf(native)
    assert error.value.keys and all(".experts." in k for k in error.value.keys)


def more_ranks_than_experts() -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    hf = {f"mlp.experts.{e}.{p}_proj.weight": torch.randn(2, 2) for e in range(2) for p in ("gate", "up", "down")}
    adapter = fmoe.adapter("per_expert")
    mine = adapter.from_hf(hf, mesh)
    assert mine["mlp.experts.down_projs"].to_local().shape[0] == (1 if mesh.get_rank() < 2 else 0)
    same({n: t.full_tensor() for n, t in mine.items()}, adapter.from_hf(hf))
    beside = adapter | fmoe.keep("visual.{rest}")  # a family with more beside it is cut all the same
    assert len(beside.plan(hf).copies) == len(adapter.plan(hf).copies) == 6
    again = beside.from_hf(hf | {"visual.w": torch.ones(3)}, mesh)
    same({n: t.to_local() for n, t in again.items() if n in mine}, {n: t.to_local() for n, t in mine.items()})


@pytest.mark.parametrize(
    "shape, names", [((1,), ("ep",)), ((2,), ("ep",)), ((2, 1), ("ep_shard", "ep")), ((2, 2), ("ep_shard", "ep"))]
)
def test_every_rank_has_its_share_of_the_whole(shape, names):
    distributed.run(shares, torch.Size(shape).numel(), shape, names)


def test_a_split_that_dtensor_would_make_otherwise_raises_on_every_rank():
    distributed.run(ranks_of_an_uneven_split, 4)


def test_a_rank_may_have_no_expert():
    distributed.run(more_ranks_than_experts, 4)


def test_dtensors_convert_where_whole_dimensions_move_and_say_so_where_not():
    distributed.run(whole_dimensions_of_dtensors_move, 4)
