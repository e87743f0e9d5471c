"""What stays plain is listed under the names that Transformers and compressed-tensors look for, or a note says why not.

Each model is loaded as on a GPU: the check that there is one is off. Nothing is computed.
"""

import json
import re
from pathlib import Path

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import fmoe
from fmoe.codecs.config import quantization_of

match = pytest.importorskip("compressed_tensors.utils.match", reason="compressed-tensors is not installed")

FAILS = (
    "raises an error for FP8 experts",
    "refuses codes",
    "does not compute with it",
    "makes one tensor of both, and fails",
)


def told(path: Path) -> dict:
    return quantization_of(json.loads((path / "config.json").read_text())) or {}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **how: None)


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_transformers_leaves_alone_what_is_plain_and_takes_codes_as_such(name, tmp_path, as_on_a_gpu):
    model, source = zoo.saved(name)
    try:
        notes = fmoe.convert(source, tmp_path / "codes", "hf", quantize="fp8", fsync=False).notes
    except fmoe.AdapterError as error:
        assert re.search("no form in fp8 blocks|expected experts that fit it", str(error)), error
        return
    fails = any(words in note for words in FAILS for note in notes)
    load = type(model).from_pretrained
    try:
        made, info = load(tmp_path / "codes", output_loading_info=True, dtype=torch.bfloat16)
    except Exception as error:
        assert fails, error
        return
    assert fails or not info["missing_keys"] and not info["unexpected_keys"]
    coded = {n for n, m in made.named_modules() if isinstance(m, FP8Linear)}
    listed = told(tmp_path / "codes")["modules_to_not_convert"]
    assert len(listed) == len(set(listed))
    assert {n for n, _ in match.match_named_modules(model, ["Linear"], listed)} == coded  # by exact names
    assert any(isinstance(m, FP8Experts) for m in made.modules())


def large(name: str) -> transformers.PreTrainedModel:
    """The tiny model, of experts of whole groups."""
    arch, own = hf.MODELS.get(name) or zoo.MODELS[name]
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 32)
    cls = getattr(transformers, arch)
    model = cls._from_config(zoo.config(cls, own | sizes), dtype=torch.float32, experts_implementation="eager").eval()
    hf.randomise(model, 0)
    return model.bfloat16()


RENAMED = ["ernie4_5_moe", "lfm2_moe", "nemotron_h", "laguna", "phimoe", "deepseek_v4"]


@pytest.mark.parametrize("quantize", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", RENAMED)
def test_compressed_tensors_loads_what_is_plain(name, quantize, tmp_path):
    model = large(name)
    model.save_pretrained(tmp_path / "plain")
    notes = fmoe.convert(tmp_path / "plain", tmp_path / "codes", "hf", quantize=quantize, fsync=False).notes
    made, info = type(model).from_pretrained(tmp_path / "codes", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found, far = made.state_dict(), []
    for n, t in model.state_dict().items():
        if ".experts." not in n:
            assert torch.allclose(found[n].float(), t.float(), atol=0.01, rtol=0.01), n
        elif (found[n].float() - t.float()).abs().max() > t.float().abs().max() / 3:
            far.append(n)
    assert bool(far) == (quantize == "nvfp4") == any("leaves them out" in note for note in notes)


def test_experts_of_a_layer_that_are_plain_are_named_as_one_module(tmp_path, as_on_a_gpu):
    model, source = zoo.saved("qwen3_moe")
    fmoe.convert(source, tmp_path / "codes", "hf", quantize="fp8", fsync=False)
    native, adapter = fmoe.load(tmp_path / "codes"), fmoe.adapter(tmp_path / "codes")
    plain = fmoe.load(source)
    mixed = {n: plain.get(n, t) if "layers.2.mlp.experts" in n else t for n, t in native.items()}
    mixed = {n: t for n, t in mixed.items() if "layers.2.mlp.experts" not in n or n in plain}
    fmoe.save(mixed, tmp_path / "mixed", adapter, fsync=False)
    assert "model.layers.2.mlp.experts" in told(tmp_path / "mixed")["modules_to_not_convert"]
    _, info = type(model).from_pretrained(tmp_path / "mixed", output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"]
