"""What `quantize=` writes is read in every way: decoded, kept as codes, verified, natively, and back."""

import json
import re

import hf
import hf_zoo as zoo
import pytest
import torch
from codec_cases import FEW, PLAIN, config
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.config import EXPORTS
from fmoe.types import bits

WRITTEN = [(n, q) for n in ("gpt_oss", "mistral4", "deepseek_v4", "qwen3_moe") for q in EXPORTS]


def held(path):
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def stacks(params):
    return {n.rpartition(".")[2]: t for n, t in params.items() if "experts." in n}


def codes(tmp_path, name, quantize):
    """The directory of a family's experts in a format, or None where the two have no form together."""
    torch.manual_seed(0)
    save(config(name, 128, 256), (PLAIN | FEW)[name](128, 256), tmp_path / "hf")
    try:
        fmoe.convert(tmp_path / "hf", tmp_path / "codes", "hf", quantize=quantize, fsync=False)
    except fmoe.AdapterError as error:
        assert "fused experts have no form in" in str(error)
        return None
    return tmp_path / "codes"


@pytest.mark.parametrize(("name", "quantize"), WRITTEN)
def test_what_is_written_is_kept_as_codes_and_computes_as_decoded(name, quantize, tmp_path):
    if (path := codes(tmp_path, name, quantize)) is None:
        return
    kept, decoded = fmoe.load(path, quantized="keep"), fmoe.load(path)
    matrices = ("gate_and_up_projs", "down_projs")
    assert all(stacks(kept)[m].dtype.itemsize == 1 or stacks(kept)[m].dtype == torch.int32 for m in matrices)
    fmoe.verify(path, quantized="keep")
    moe = fmoe.adapter(path).moe_config
    x, weights = torch.randn(4, 128).bfloat16(), torch.rand(4, 1)
    routing = fmoe.Routing(torch.tensor([[0], [1], [2], [1]]), weights, None)
    plain = {n: t for n, t in stacks(decoded).items() if "_scale" not in n and "_activation" not in n}
    y = fmoe.experts(plain, x, routing, moe)
    torch.testing.assert_close(fmoe.experts(stacks(kept), x, routing, moe), y, rtol=0.02, atol=0.02)
    fmoe.convert(path, tmp_path / "kept", quantized="keep", fsync=False)
    fmoe.convert(tmp_path / "kept", tmp_path / "back", "hf", fsync=False)
    was, now = held(path), held(tmp_path / "back")
    assert now.keys() == was.keys() and all(torch.equal(bits(now[n]), bits(t)) for n, t in was.items())
    assert (tmp_path / "back" / "config.json").read_bytes() == (path / "config.json").read_bytes()


@pytest.mark.parametrize("quantize", ["fp8", "mxfp8", "mxfp4"])
def test_codes_that_lie_otherwise_than_config_says_are_refused_by_their_format(quantize, tmp_path):
    path = codes(tmp_path, "gpt_oss", quantize)
    told = json.loads((path / "config.json").read_text())
    method = told["quantization_config"]["quant_method"]
    told["quantization_config"]["quant_method"] = "mxfp4" if quantize == "fp8" else "fp8"
    (path / "config.json").write_text(json.dumps(told))
    if quantize == "mxfp8":  # which lies as fp8 does
        fmoe.load(path, quantized="keep")
        return
    with pytest.raises(fmoe.AdapterError, match=f"is in {quantize}.*Fix: quant_method '{method}' there") as error:
        fmoe.load(path, quantized="keep")
    assert "gate_up_proj" in str(error.value) and fmoe.load(path)


def test_a_family_that_could_not_read_what_it_writes_writes_nothing():
    told = config("hunyuan_image_3_moe", 128, 256)
    for quantize in EXPORTS:
        with pytest.raises(fmoe.AdapterError, match=f"quantize='{quantize}': hunyuan_image_3_moe's files hold gate"):
            fmoe.adapter("hunyuan_image_3_moe", told, quantize=quantize)
    for name in fmoe.families.FAMILIES:
        if name != "hunyuan_image_3_moe":
            fmoe.adapter(name, {}, quantize="fp8")


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_fp8_of_what_transformers_writes_is_read_again_and_told_or_not_written(name, tmp_path):
    """Layouts that sizes tell apart; other experts in a model, as a vision tower's; stacks that a decoder passes by."""
    _, source = zoo.saved(name)
    try:
        report = fmoe.convert(source, tmp_path / "codes", "hf", quantize="fp8", fsync=False)
    except fmoe.AdapterError as error:
        assert re.search("Fix: |have no form in|can be written in", str(error)) and not (tmp_path / "codes").exists()
        return
    fmoe.verify(tmp_path / "codes")
    fused = [n for n, t in held(tmp_path / "codes").items() if t.dtype == torch.float8_e4m3fn and t.ndim == 3]
    assert any("takes codes for numbers where it decodes" in note for note in report.notes) == bool(fused)
