"""diff compares what is alike: codes with codes, and says what it cannot compare."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import demo, runner
from directories import INDEX
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.checkpoint import diff


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    path = tmp_path_factory.mktemp("codes")
    adapter = fmoe.adapter("per_expert", {"model_type": "per_expert"})
    stacks = {"gate_and_up_projs": torch.randn(2, 128, 256), "down_projs": torch.randn(2, 128, 128)}
    fmoe.save({f"model.layers.0.mlp.experts.{n}": t for n, t in stacks.items()}, path / "plain", adapter)
    fmoe.convert(path / "plain", path / "fp8", to="hf", quantize="fp8")
    fmoe.convert(path / "fp8", path / "kept", quantized="keep")
    fmoe.convert(path / "fp8", path / "decoded")
    return path


@pytest.mark.parametrize("native", ["kept", "decoded"])
def test_what_was_made_of_codes_is_equal_to_them(fp8, native):
    for pair in (("fp8", native), (native, "fp8")):
        assert {row["status"] for row in diff(*(fp8 / side for side in pair))} == {"equal"}


def test_codes_against_numbers_are_refused(fp8):
    with pytest.raises(fmoe.AdapterError, match="holds codes and scales, and one decoded numbers. Fix: fmoe convert"):
        list(diff(fp8 / "kept", fp8 / "decoded"))


def test_a_directory_of_rules_of_ones_own_asks_for_them(tmp_path):
    mine = fmoe.adapter(demo() / "hf") >> fmoe.rename("model.", "policy.")
    fmoe.convert(demo() / "hf", tmp_path / "own", adapter=mine)
    with pytest.raises(fmoe.AdapterError, match="was made with an adapter of your own. Fix: adapter="):
        list(diff(demo() / "hf", tmp_path / "own"))
    assert {row["status"] for row in diff(demo() / "hf", tmp_path / "own", adapter=mine)} == {"equal"}


def test_who_is_alone_is_said_by_the_columns(monkeypatch, capsys, tmp_path):
    path = Path(shutil.copytree(demo() / "hf", tmp_path / "less"))
    lost = json.loads((path / INDEX).read_text())["weight_map"].popitem()[0]
    for file in path.glob("*.safetensors"):
        if lost in (tensors := load_file(file)):
            tensors.pop(lost)
            save_file(tensors, file, {"format": "pt"})
    (path / INDEX).unlink()
    code, out, _ = runner(monkeypatch, capsys)("diff", demo() / "hf", path, columns=200)
    assert code == 1 and "only in A" in out and lost in out


def test_a_config_that_says_less_than_the_files_hold_is_told(tmp_path):
    native = fmoe.load(demo() / "hf")
    config = json.loads((demo() / "hf" / "config.json").read_text()) | {"dtype": "bfloat16"}
    report = fmoe.save(native, tmp_path / "wide", fmoe.adapter("qwen3_moe", config))
    assert any("config.json says bfloat16" in n and "are float32: Transformers rounds them" in n for n in report.notes)
    same = fmoe.save(native, tmp_path / "same", fmoe.adapter("qwen3_moe", config | {"dtype": "float32"}))
    assert not any("Transformers rounds" in note for note in same.notes)


def test_a_picture_of_another_systems_directory_says_how_to_get_one(tmp_path):
    fmoe.convert(demo() / "hf", tmp_path / "titan", to="torchtitan")
    with pytest.raises(fmoe.AdapterError, match="titan is .*Fix: fmoe convert .*titan HF --to hf, then draw that"):
        fmoe.draw.checkpoint(tmp_path / "titan")
