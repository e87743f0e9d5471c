"""LoRA of experts whose gate and up are one matrix in files: its names are those of the model's modules."""

import pytest
import torch
from silent_cases import CONFIG, lora_of, refused

import fmoe
from fmoe.lowrank.targets import table_of
from fmoe.testing import same

SIZES = dict(num_experts=4, moe_topk=1, hidden_size=5, moe_intermediate_size=3)
STEM = "base_model.model.model.layers.0.mlp.experts."


def test_one_a_and_the_rows_of_b_in_the_order_of_the_file() -> None:
    adapter, lora = fmoe.adapter("hunyuan_image_3_moe", SIZES), lora_of()
    files, parts = adapter.to_hf(lora), ("gate_and_up_proj", "down_proj")
    assert files.keys() == {f"{STEM}{e}.{p}.lora_{m}.weight" for e in range(4) for p in parts for m in "AB"}
    A, B = (files[f"{STEM}2.gate_and_up_proj.lora_{m}.weight"] for m in "AB")
    native = (lora[STEM + "lora_gate_and_up_A"][2] @ lora[STEM + "lora_gate_and_up_B"][2]).mT
    torch.testing.assert_close(B @ A, torch.cat([native[3:], native[:3]]))  # up, then gate
    for made in (adapter, adapter.resolve(files), adapter.inverse.inverse):
        same(made.from_hf(files), lora)
        same(made.to_hf(lora), files)
    some = adapter.from_hf(files, e=range(1, 3))
    assert {n: torch.equal(t, lora[n][1:3]) for n, t in some.items()} == dict.fromkeys(lora, True)
    assert adapter.from_hf({n: t.to("meta") for n, t in files.items()}).keys() == lora.keys()
    assert table_of(adapter).choices() == {"lora": ("per-expert",)}


def test_a_directory_of_it_names_modules_that_are_there(tmp_path) -> None:
    adapter, lora = fmoe.adapter("hunyuan_image_3_moe", SIZES), lora_of()
    config = fmoe.lora.save(lora, tmp_path, adapter, lora_alpha=4)
    assert {n.rpartition(".")[2] for n in config.target_modules} == {"gate_and_up_proj", "down_proj"}
    tuned = fmoe.lora.load(tmp_path, adapter)
    same(tuned.params, lora)
    assert set(tuned.scales.values()) == {2.0}


def test_halves_as_automodel_writes_them_are_read_and_come_back() -> None:
    adapter, lora = fmoe.adapter("hunyuan_image_3_moe", SIZES), lora_of()
    files = fmoe.adapter("qwen3_moe", CONFIG, lora="per-expert").to_hf(lora)
    same(adapter.from_hf(files), lora)
    same(adapter.resolve(files).to_hf(lora), files)
    with refused(f"{STEM}0.gate_proj.lora_B.weight", match="two forms of LoRA at once"):
        adapter.from_hf(files | adapter.to_hf(lora))


@pytest.mark.parametrize("lost", ["A", "B"])
def test_a_half_and_matrices_of_their_own_are_refused(lost: str) -> None:
    adapter, lora = fmoe.adapter("hunyuan_image_3_moe", SIZES), lora_of()
    files = adapter.to_hf(lora)
    with refused(f"{STEM}2.gate_and_up_proj.lora_{lost}.weight"):
        adapter.from_hf({n: t for n, t in files.items() if f".2.gate_and_up_proj.lora_{lost}" not in n})
    own = {STEM + "lora_gate_and_up_A": torch.ones(4, 5, 2, 2)}
    with refused(*own, match="with one A for both. Fix: fmoe.lora.lift"):
        adapter.to_hf(lora | own)
