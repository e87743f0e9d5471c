"""Codes that a system's files hold go back by themselves, bit for bit: every system that can, in every format."""

import json

import pytest
import torch
from codec_cases import CASES, config, made
from gguf_cases import parts, saved
from gguf_writer import write
from hf_synthetic import deepseek_v3_fp8
from system_directories import files

import fmoe
from fmoe.families import FAMILIES
from fmoe.systems import SYSTEMS
from fmoe.types import bits

FP8 = {"quantization_config": {"quant_method": "fp8"}}


def alone(case):
    """The codes of one layer, in one of the formats, with a config that speaks of codes."""
    _, tensors = made(case)
    del tensors["model.norm.weight"]  # not where every family has it
    inside = "language_model." if case[0] == "mistral4" else ""
    told = FP8 if case[0] != "gpt_oss" else {"quantization_config": {"quant_method": "mxfp4"}}
    return config(case[0], 128, 256) | told, {inside + n: t for n, t in tensors.items()}


MODELS = {
    "gpt_oss": lambda: parts("gpt_oss mxfp4")[:2],
    "deepseek_v3": lambda: deepseek_v3_fp8(num_nextn_predict_layers=0),
}
KEPT = [(s.name, kind) for s in SYSTEMS.values() if not s.native for kind in FAMILIES if s.keeps(kind)]
CODED = [(s, kind, MODELS[kind]) for s, kind in KEPT]
CODED += [(s.name, " ".join(c), lambda c=c: alone(c)) for s in SYSTEMS.values() if s.native for c in CASES]


@pytest.mark.parametrize(("system", "name", "model"), CODED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_held_in_codes_is_known_by_itself_verified_and_comes_back(system, name, model, tmp_path):
    told, tensors = model()
    src, there, how = saved(tmp_path / "hf", told, tensors), tmp_path / "there", {"fsync": False}
    like = {"like": write(tmp_path / "like.gguf", parts("gpt_oss mxfp4")[2])} if system == "gguf" else {}
    fmoe.convert(src, there, to=system, quantized="keep", **how, **like)
    of = {"from_": system} if SYSTEMS[system].native else {}
    assert any("codes and scales are compared as they are" in n for n in fmoe.verify(there, **of).notes)
    found = fmoe.inspect(there, **of)
    assert found["format"] == system and not found["problems"]
    fmoe.convert(there, tmp_path / "back", to="hf", **of, **how)
    equal(files(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    if not of:  # ours, decoded: of Automodel's that is what its table begins with
        fmoe.convert(there, tmp_path / "decoded", to="native", **how)
        fmoe.convert(src, tmp_path / "native", **how)
        equal(files(tmp_path / "decoded"), files(tmp_path / "native"))
    for choice in ({"dtype": "bfloat16"}, {"quantized": "decode"}):
        with pytest.raises(fmoe.AdapterError, match="as they are. Fix: "):
            fmoe.convert(there, tmp_path / "no", to="hf", **choice, **of)
    assert not (tmp_path / "no").exists()


def equal(a, b):
    assert a.keys() == b.keys()
    assert all(a[n].dtype == t.dtype and torch.equal(bits(a[n]), bits(t)) for n, t in b.items())
