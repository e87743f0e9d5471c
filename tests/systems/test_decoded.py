"""Decoded weights of another system: config.json speaks of no codes there, and the way back has them bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from codec_cases import CASES, config, made
from hf import save
from safetensors.torch import load_file
from systems_zoo import model

import fmoe
from fmoe.codecs.config import FIELDS, QUANTS, coded, decoded
from fmoe.types import bits

TOLD = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def says(path: Path) -> bool:
    told = json.loads((path / "config.json").read_text())
    return any(field in inside for field in FIELDS for inside in (told, told.get("text_config", {})))


def held(path: Path) -> dict:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    ours, theirs = held(a), held(b)
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and torch.equal(bits(t), bits(theirs[n])) for n, t in ours.items()
    )


def codes(path: Path) -> bool:
    """Whether expert weights are codes."""
    stacks = (t for n, t in held(path).items() if n.endswith("_projs"))
    return any(t.dtype.itemsize == 1 or not t.is_floating_point() for t in stacks)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_config_and_tensors_agree_in_automodel_and_the_way_back_is_exact(case, tmp_path):
    _, tensors = made(case)
    del tensors["model.norm.weight"]  # not where every family has it
    tensors = {f"language_model.{n}" if case[0] == "mistral4" else n: t for n, t in tensors.items()}
    told = config(case[0], 128, 256) | {"quantization_config": TOLD}
    save(told, tensors, tmp_path / "hf")
    for name in QUANTS:
        (tmp_path / "hf" / name).write_text("{}")
    first = case == next(iter(CASES))  # what follows is the same for all
    if first:
        fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    for source in ("hf", "native")[: 1 + first]:
        there, back = tmp_path / f"{source} there", tmp_path / f"{source} back"
        fmoe.convert(tmp_path / source, there, to="automodel", fsync=False)
        assert not says(there) and not codes(there) and not {*QUANTS} & {p.name for p in there.iterdir()}
        fmoe.convert(there, back, to="hf", fsync=False)  # found by its names
        assert says(back) and same(back, tmp_path / "hf")
    if not first:
        return
    fmoe.convert(tmp_path / "hf there", tmp_path / "ours", from_="automodel", fsync=False)
    assert says(tmp_path / "ours") and same(tmp_path / "ours", tmp_path / "native")
    fmoe.verify(tmp_path / "hf there")
    assert fmoe.inspect(tmp_path / "hf there")["format"] == "automodel"
    fmoe.convert(tmp_path / "hf", tmp_path / "kept", to="automodel", quantized="keep", fsync=False)
    assert says(tmp_path / "kept") and codes(tmp_path / "kept")


def test_blocks_that_are_not_the_usual_ones_are_known_on_the_way_back(tmp_path):
    told = config("qwen3_moe", 128, 256)
    adapter = fmoe.adapter("qwen3_moe", told)
    plain = {n: t for n, t in made(("deepseek_v3", "fp8 blocks"))[1].items() if "scale" not in n}
    native = adapter.from_hf({n: t.bfloat16() for n, t in plain.items()})
    told |= {"quantization_config": TOLD | {"weight_block_size": [64, 32]}}
    tensors = fmoe.adapter("qwen3_moe", told).to_hf(native, quantization=True)
    save(told, tensors, tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "there", to="automodel", fsync=False)
    fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf", from_="automodel", fsync=False)
    assert same(tmp_path / "back", tmp_path / "hf")
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
        == told["quantization_config"]
    )


@pytest.mark.parametrize("field", FIELDS)
def test_what_decoded_moves_coded_puts_back(field):
    for told in ({field: TOLD, "a": 1}, {"text_config": {field: TOLD}}, {"a": 1}):
        assert coded(decoded(told)) == told and not says_any(decoded(told))


def says_any(told: dict) -> bool:
    return any(f in inside for f in FIELDS for inside in (told, told.get("text_config", {})))


def test_mxfp4_for_a_table_of_numbers_says_how_it_becomes_some_and_where_it_may_stay(tmp_path):
    told, tensors = model("gpt_oss")
    for n in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        rows = tensors[n].shape[2]
        parts = {f"{n}_blocks": torch.zeros(8, rows, 1, 16), f"{n}_scales": torch.zeros(8, rows, 1)}
        tensors = {k: t for k, t in tensors.items() if k != n} | {k: t.to(torch.uint8) for k, t in parts.items()}
    save(told | {"quantization_config": {"quant_method": "mxfp4"}}, tensors, tmp_path / "hf")
    for to, end in (("torchtitan", "then BF16$"), ("gpt_oss_original", "then BF16, or quantized='keep'$")):
        with pytest.raises(
            fmoe.AdapterError, match=f"quantised with mxfp4, and {to}'s tables.*--dtype bfloat16, {end}"
        ):
            fmoe.convert(tmp_path / "hf", tmp_path / to, to=to)
