"""A Hugging Face checkpoint in codes becomes one in other codes, or in another layout in numbers, in one command."""

import json

import pytest
import torch
from codec_cases import CASES, config, made
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.config import EXPORTS, quantization_of
from fmoe.types import bits

ALL = pytest.mark.parametrize("case", CASES, ids=" ".join)
OFF = {"fp8": 0.05, "mxfp8": 0.05, "mxfp4": 0.2, "int4": 0.2, "nvfp4": 0.2}
"""How far experts may be from what they were, by norm."""


def written(case, folder):
    """A checkpoint whose config says what it is in."""
    _, tensors = made(case)
    told = config(case[0], 128, 256) | {"torch_dtype": "bfloat16"}
    save(told, tensors, folder.with_name("bare"))
    fmoe.save(fmoe.load(folder.with_name("bare")), folder, fmoe.adapter(folder.with_name("bare")), fsync=False)
    assert quantization_of(json.loads((folder / "config.json").read_text()))
    return tensors, fmoe.load(folder)


def said(folder):
    """What a config says of codes, and the kinds of the tensors beside it."""
    told = quantization_of(json.loads((folder / "config.json").read_text()))
    return told, sorted({(n.rpartition(".")[2], t.dtype) for n, t in held(folder).items()}, key=str)


def held(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def off(native, folder):
    now = fmoe.load(folder)
    stacks = [n for n in native if n.endswith("_projs")]
    return max(float((native[n].double() - now[n].double()).norm() / native[n].double().norm()) for n in stacks)


@ALL
@pytest.mark.parametrize("quantize", EXPORTS)
def test_codes_become_other_codes_and_the_same_ones_stay_as_they_are(case, quantize, tmp_path):
    tensors, native = written(case, tmp_path / "hf")
    try:
        fmoe.convert(tmp_path / "hf", tmp_path / "codes", "hf", quantize=quantize, fsync=False)
    except fmoe.AdapterError as error:
        told = str(error)
        assert "fused experts have no form in" in told and not any("scale" in key for key in error.keys)
        assert {len(tensors[n].shape) for n in error.keys} <= {3, 4}
        return
    fmoe.verify(tmp_path / "codes")
    assert not [note for note in fmoe.inspect(tmp_path / "codes")["notes"] if "quantization_config" in note]
    assert off(native, tmp_path / "codes") <= OFF[quantize]
    if case[1].startswith(quantize):
        found = held(tmp_path / "codes")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(bits(found[n]), bits(t)) for n, t in tensors.items())
    else:  # as of plain weights, whatever codes there were before
        fmoe.convert(tmp_path / "hf", tmp_path / "plain", "hf", dtype="bfloat16", fsync=False)
        fmoe.convert(tmp_path / "plain", tmp_path / "fresh", "hf", quantize=quantize, fsync=False)
        assert said(tmp_path / "codes") == said(tmp_path / "fresh")
    fmoe.convert(tmp_path / "codes", tmp_path / "again", "hf", quantize=quantize, fsync=False)
    first, second = held(tmp_path / "codes"), held(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(bits(first[n]), bits(t)) for n, t in second.items())


@ALL
def test_codes_become_numbers_in_another_layout_in_one_command(case, tmp_path):
    _, native = written(case, tmp_path / "hf")
    for layout in ("fused", "per_expert"):
        try:
            fmoe.convert(tmp_path / "hf", tmp_path / layout, "hf", dtype="bfloat16", layout=layout, fsync=False)
        except fmoe.AdapterError as error:
            assert "has no choice 'layout'" in str(error)
            continue
        assert off(native, tmp_path / layout) == 0
        assert not any("scale" in n for n in held(tmp_path / layout))
        assert quantization_of(json.loads((tmp_path / layout / "config.json").read_text())) is None


def test_what_deepseek_v4_says_of_its_experts_at_its_top_goes_with_them(tmp_path):
    """As published: Transformers moves `expert_dtype` into quantization_config, whatever that says."""
    _, tensors = made(("deepseek_v4", "mxfp4 .scale"))
    quant = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    told = config("deepseek_v4", 128, 256) | {"expert_dtype": "fp4", "quantization_config": quant}
    save(told, tensors, tmp_path / "hf")
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())
    fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    assert (read("back")["expert_dtype"], read("back")["quantization_config"]) == ("fp4", quant)
    fmoe.convert(tmp_path / "hf", tmp_path / "fp8", "hf", quantize="fp8", fsync=False)
    assert "expert_dtype" not in read("fp8") | read("fp8")["quantization_config"]
    fmoe.convert(tmp_path / "fp8", tmp_path / "fp4", "hf", quantize="mxfp4", fsync=False)
    assert read("fp4")["quantization_config"]["expert_dtype"] == "fp4"
