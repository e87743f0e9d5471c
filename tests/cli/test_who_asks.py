"""An error says what helps the one who asked: save, a system, diff."""

import pytest
from command import demo

import fmoe
from fmoe.checkpoint import diff
from fmoe.checkpoint.files.directory import open_checkpoint


def test_hugging_faces_names_where_native_ones_are_expected(tmp_path):
    source = open_checkpoint(demo() / "hf")
    adapter, params = fmoe.adapter("qwen3_moe", source.config), source.read(source.specs)
    asked = [
        lambda: fmoe.save(params, tmp_path / "out", adapter),
        lambda: fmoe.save(params, tmp_path / "out", adapter, "native"),
        lambda: adapter.to_hf(params),
        lambda: adapter.iter_hf(params),
    ]
    for call in asked:
        with pytest.raises(fmoe.AdapterError, match=r"^these are Hugging Face's names, .*fmoe.save\(adapter.from_hf"):
            call()
    assert not (tmp_path / "out").exists()
    with pytest.raises(fmoe.AdapterError, match="'model.layers.0.mlp.experts.x': no rule claims it"):
        adapter.to_hf(adapter.from_hf(params) | {"model.layers.0.mlp.experts.x": next(iter(params.values()))})


def test_codes_and_scales_where_a_system_takes_numbers(tmp_path):
    fmoe.convert(demo() / "hf", tmp_path / "bf16", "hf", dtype="bfloat16")
    fmoe.convert(tmp_path / "bf16", tmp_path / "fp8", "hf", quantize="fp8")
    with pytest.raises(
        fmoe.AdapterError,
        match="quantised with fp8, and torchtitan's tables .*expected floats.*--dtype bfloat16",
    ):
        fmoe.convert(tmp_path / "fp8", tmp_path / "titan", "torchtitan")
    fmoe.convert(tmp_path / "fp8", tmp_path / "back", "hf", dtype="bfloat16")  # what the message says
    fmoe.convert(tmp_path / "back", tmp_path / "titan", "torchtitan")


def test_a_systems_directory_is_not_compared_across_layouts(tmp_path):
    fmoe.convert(demo() / "hf", tmp_path / "titan", "torchtitan")
    with pytest.raises(fmoe.AdapterError, match="titan is .*Fix: fmoe convert .*titan HF --to hf, then diff that"):
        list(diff(demo() / "hf", tmp_path / "titan"))
