"""save refuses what load would refuse: a part of a model, by name, unless the part says that it is one."""

import json

import pytest
import torch
from safetensors.torch import save_file
from systems_zoo import model

import fmoe

NAMES = ("qwen3_moe alike", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module", params=NAMES)
def whole(request, tmp_path_factory):
    """(adapter, native parameters, directory) of a whole model."""
    config, tensors = model(request.param)
    path = tmp_path_factory.mktemp("hf")
    save_file({n: t.clone() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    return fmoe.adapter(path), fmoe.load(path), path


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("part", ["model.norm.", "self_attn.o_proj.", "mlp.gate.", "input_layernorm.", "mlp.experts."])
@pytest.mark.parametrize("save", [fmoe.save, fmoe.dcp.save])
def test_a_model_without_a_part_is_not_written(whole, tmp_path, save, part, layout):
    adapter, native, _ = whole
    first = next(n for n in native if part in n).partition(part)[0] + part
    lost = {n for n in native if n.startswith(first)}
    rest = {n: t for n, t in native.items() if n not in lost}
    with pytest.raises(Exception, match="would not be whole, and fmoe.load would refuse it. Fix: save all") as error:
        save(rest, tmp_path / "part", adapter, layout)
    assert isinstance(error.value, fmoe.AdapterError)
    assert any(n in str(error.value) for n in lost) and not (tmp_path / "part").exists()
    save(native, tmp_path / "part", adapter, layout)
    assert fmoe.load(tmp_path / "part").keys() == native.keys()


def test_parts_that_say_so_are_written(whole, tmp_path):
    adapter, native, path = whole
    cut = {n: t[:2] if ".experts." in n else t for n, t in native.items()}
    fmoe.save(cut, tmp_path / "range", adapter, "native", e=range(0, 2))
    assert fmoe.load(tmp_path / "range").keys() == native.keys()
    own = fmoe.adapter(path) | fmoe.drop("model.norm.{s}", because="it is made anew")
    rest = {n: t for n, t in native.items() if not n.startswith("model.norm.")}
    fmoe.save(rest, tmp_path / "own", own)


def test_what_is_given_to_the_wrong_function_is_named(whole):
    adapter, native, path = whole
    block = next(n for n in native if n.endswith("down_projs")).rpartition("experts.")[0]
    experts = fmoe.subtree(native, block + "experts")
    config, x = adapter.moe_config, torch.zeros(3, adapter.moe_config.dim)
    alone = "params are of experts alone, expected the whole block.\nFix: fmoe.subtree"
    for call in (fmoe.route, fmoe.moe):
        with pytest.raises(ValueError, match=alone):
            call(experts, x, config)
        with pytest.raises(ValueError, match=r"params is \[1\], expected a dict of tensors by name"):
            call([1], x, config)
    with pytest.raises(fmoe.AdapterError, match=r"inspect: e=range\(0, 2\), expected no choice.*Fix: fmoe.load"):
        fmoe.inspect(path, e=range(0, 2))
