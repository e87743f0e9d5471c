"""Codes of which config.json says nothing, and a config that speaks of codes where there are none: a note, always."""

import json
import re

import pytest
from codec_cases import CASES, PLAIN, config, made
from hf import save

import fmoe

SAYS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def notes(path, to):
    """What each command says of a directory."""
    told = fmoe.inspect(path)
    assert told["problems"] == []
    return [told["notes"], fmoe.verify(path).notes, fmoe.convert(path, to, fsync=False).notes]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_codes_of_which_the_config_says_nothing_are_noted(case, tmp_path):
    _, tensors = made(case)
    told = config(case[0], 128, 256)
    save(told, tensors, tmp_path / "hf")
    for found in notes(tmp_path / "hf", tmp_path / "native"):
        assert [n for n in found if "codes, and config.json has no quantization_config" in n]
    save(told | {"quantization_config": SAYS}, tensors, tmp_path / "said")
    for found in notes(tmp_path / "said", tmp_path / "native of said"):
        assert not [n for n in found if "quantization_config" in n]
    fmoe.save(fmoe.load(tmp_path / "hf"), tmp_path / "saved", fmoe.adapter(tmp_path / "hf"), fsync=False)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_config_that_speaks_of_codes_where_there_are_none_is_noted(name, tmp_path):
    told, tensors = config(name, 128, 256), PLAIN[name](128, 256)
    save(told | {"quantization_config": SAYS}, tensors, tmp_path / "hf")
    for found in notes(tmp_path / "hf", tmp_path / "native"):
        assert [n for n in found if "quantization_config (fp8), and no tensor is in codes" in n]
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    save(told, tensors, tmp_path / "plain")
    for found in notes(tmp_path / "plain", tmp_path / "native of plain"):
        assert not [n for n in found if "quantization_config" in n]


@pytest.mark.parametrize("bad", [{"quant_method": ["fp8"]}, {"quant_method": 8}, {"config_groups": []}], ids=str)
def test_a_method_that_is_no_name_is_refused_beside_plain_weights_too(bad, tmp_path):
    told, tensors = config("deepseek_v3", 128, 256), PLAIN["deepseek_v3"](128, 256)
    save(told | {"quantization_config": bad}, tensors, tmp_path / "hf")
    (field,) = bad
    refusal = f"quantization_config.{field} is .*expected a"
    for call in (fmoe.adapter, fmoe.load, fmoe.verify):
        with pytest.raises(fmoe.AdapterError, match=refusal):
            call(tmp_path / "hf")
    assert any(re.search(refusal, problem) for problem in fmoe.inspect(tmp_path / "hf")["problems"])
