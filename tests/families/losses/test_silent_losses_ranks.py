"""What others lose without a word, over ranks and placements: "12.n" as in `test_silent_losses`."""

from collections.abc import Callable
from typing import Any

import hf_zoo as zoo
import pytest
import torch
from directories import load
from silent_cases import experts, into, mesh_of, stacked
from torch.distributed.tensor import DTensor, Replicate, Shard

import fmoe

CASES: dict[str, Callable[..., None]] = {}
case = into(CASES)


@case("12.21")
def one_rule_for_uneven_experts(tmp_path) -> None:
    ranges = [fmoe.sharding.expert_range(10, 4, r) for r in range(4)]
    assert [e for r in ranges for e in r] == list(range(10))
    for rank in range(4):
        with mesh_of((4,), ("ep",), rank) as mesh:
            assert range(*fmoe.sharding.get_expert_range_for_rank_from_mesh(mesh, 10)) == ranges[rank]
            found = fmoe.rule("{e} [d]", "down_projs [e d]")
            with pytest.raises(ValueError, match="10 experts"):  # DTensor's Shard would cut elsewhere
                found.from_hf({str(e): torch.ones(2) for e in range(10)}, mesh)


@case("12.26")
def ep_shard_of_plain_tensors(tmp_path) -> None:
    for model_type, tensors in (("qwen3_moe", experts(I=4, D=6)), ("step3p5", stacked())):
        whole = fmoe.adapter(model_type).from_hf(tensors)
        for rank in range(4):
            with mesh_of((2, 2), ("ep_shard", "ep"), rank) as mesh:
                mine = fmoe.adapter(model_type).from_hf(tensors, mesh)
                for name, tensor in whole.items():
                    found: Any = mine[name]
                    assert found.shape == tensor.shape and found.placements == (Shard(1), Shard(0)), name
                    e, d = (n // 2 for n in tensor.shape[:2])
                    at = tensor[rank % 2 * e :][:e, rank // 2 * d :][:, :d]
                    assert torch.equal(found.to_local(), at)


@case("12.27")
def every_placement_counts(tmp_path) -> None:
    with mesh_of((2, 2), ("ep_shard", "ep")) as mesh:
        check = fmoe.sharding.validate_dtensor_expert_sharding
        right = DTensor.from_local(torch.ones(2, 2, 3), mesh, (Shard(1), Shard(0)), run_check=False)
        assert check(right, 4)
        for wrong, E in (((Shard(0), Shard(1)), 2), ((Shard(0), Replicate()), 2), ((Shard(0), Shard(0)), 1)):
            with pytest.raises(ValueError, match="placement"):
                check(DTensor.from_local(torch.ones(E, 2, 3), mesh, wrong, run_check=False), 4)


@case("12.37")
def a_shard_of_the_inner_axis(tmp_path) -> None:
    """Gate and up sharded on I become a strided shard of the fused axis: this rank's own columns, of each half."""
    tensors = stacked()
    whole = fmoe.adapter("step3p5").from_hf(tensors)["model.layers.0.moe.experts.gate_and_up_projs"]
    for rank in range(2):
        with mesh_of((2,), ("ep_shard",), rank) as mesh:
            cut = lambda t, dim: DTensor.from_local(t.chunk(2, dim)[rank], mesh, (Shard(dim),), run_check=False)  # noqa: B023
            mine = {n: cut(t, 2 if "down" in n else 1) for n, t in tensors.items()}
            found: Any = fmoe.adapter("step3p5").from_hf(mine)["model.layers.0.moe.experts.gate_and_up_projs"]
            assert found.shape == whole.shape
            columns = torch.arange(8).view(2, 2, 2)[:, rank].flatten()
            assert torch.equal(found.to_local(), whole[:, :, columns])


@case("12.45")
def dtype_is_what_was_asked_for(tmp_path) -> None:
    tensors = experts()
    adapter = fmoe.adapter("qwen3_moe", dtype="bf16")
    with mesh_of((1,), ("ep",)) as mesh:
        cut = {n: DTensor.from_local(t, mesh, (Replicate(),), run_check=False) for n, t in tensors.items()}
        for made in (adapter.from_hf(tensors), adapter.from_hf(cut), adapter.from_hf(tensors, mesh)):
            assert {t.dtype for t in made.values()} == {torch.bfloat16}


@case("12.55")
def plain_tensors_are_cut_by_expert(tmp_path) -> None:
    for name in ("mistral4", "gpt_oss"):
        _, path = zoo.saved(name)
        tensors, adapter = load(path), fmoe.adapter(path)
        whole = adapter.from_hf(tensors)
        mine = adapter.from_hf(tensors, e=range(2, 6))
        for n, t in whole.items():
            assert torch.equal(mine[n], t[2:6] if ".experts." in n and "shared" not in n else t), n
        with mesh_of((4,), ("ep",), rank=1) as mesh:
            found = adapter.from_hf(tensors, mesh)
            key = next(n for n in whole if n.endswith("down_projs"))
            assert torch.equal(found[key].to_local(), whole[key][2:4]) and found[key].shape == whole[key].shape


@pytest.mark.parametrize("number", CASES)
def test_nothing_is_lost_without_a_word(number, tmp_path):
    CASES[number](tmp_path)
