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
    _, tensors = made(case)
    save(config(case[0], 128, 256) | {"torch_dtype": "bfloat16"}, tensors, folder)
    return tensors, fmoe.load(folder)


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
    assert quantization_of(json.loads((tmp_path / "codes" / "config.json").read_text()))
    assert off(native, tmp_path / "codes") <= OFF[quantize]
    if case[1].startswith(quantize):
        found = held(tmp_path / "codes")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(bits(found[n]), bits(t)) for n, t in tensors.items())
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
