"""A directory that is not whole is refused by name; what a native one was made with is what its way back uses."""

import json

import hf
import hf_zoo as zoo
import pytest
import tiny
from directories import files
from safetensors.torch import load_file, save_file

import fmoe

EXPERTS = "model.layers.1.mlp.experts."
LOST = {
    "all experts of a layer": (lambda n: n.startswith(EXPERTS), EXPERTS + "0.gate_proj.weight"),
    "a router": (lambda n: n == "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight"),
}


def refused(path, tmp_path, key):
    """inspect lists the key; verify, convert and load refuse by it, and nothing is written."""
    assert any(key in text for text in fmoe.inspect(path)["problems"])
    native = (path / "fmoe.json").exists()
    to = "hf" if native else "native"
    for call in (fmoe.verify, fmoe.load, lambda p: fmoe.convert(p, tmp_path / "new", to)):
        with pytest.raises(fmoe.AdapterError) as error:
            call(path)
        assert any(key in named for named in error.value.keys), error.value
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lost", LOST)
def test_what_a_directory_lacks_is_named(lost, tmp_path):
    gone, key = LOST[lost]
    tensors = tiny._qwen3(False)
    hf.save(tiny.QWEN3, tensors, tmp_path / "whole")
    assert not fmoe.inspect(tmp_path / "whole")["problems"]
    hf.save(tiny.QWEN3, {n: t for n, t in tensors.items() if not gone(n)}, tmp_path / "part")
    refused(tmp_path / "part", tmp_path, key)


def test_experts_under_names_that_no_rule_knows_are_named(tmp_path):
    tensors = tiny._qwen3(True)
    moved = {n.replace("mlp.experts.", "mlp.switch_mlp."): t for n, t in tensors.items()}
    hf.save(tiny.QWEN3, moved, tmp_path / "part")
    refused(tmp_path / "part", tmp_path, "model.layers.0.mlp.switch_mlp.down_proj")


@pytest.mark.parametrize("lost", ["model.norm.weight", EXPERTS + "down_projs", "model.layers.1.mlp.gate.weight"])
def test_what_a_native_directory_must_give_back_is_missed(lost, tmp_path):
    hf.save(tiny.QWEN3, tiny._qwen3(False), tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    tensors = load_file(tmp_path / "native" / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "native" / "model.safetensors")
    refused(tmp_path / "native", tmp_path, lost)


def test_choices_that_names_do_not_show_are_kept_for_the_way_back(tmp_path):
    _, source = zoo.saved("qwen3_vl_moe")
    native, back = tmp_path / "native", tmp_path / "back"
    fmoe.convert(source, native, layout="fused", fsync=False)
    assert json.loads((native / "fmoe.json").read_text())["choices"] == {"layout": "fused"}
    assert not fmoe.inspect(native)["problems"]
    fmoe.verify(native)
    fmoe.convert(native, back, "hf", fsync=False)
    assert files(back) == files(source)
    params, adapter = fmoe.load(native), fmoe.adapter(source, layout="fused")
    fmoe.save(params, tmp_path / "saved", adapter, "native", fsync=False)
    assert json.loads((tmp_path / "saved" / "fmoe.json").read_text())["choices"] == {"layout": "fused"}
    fmoe.convert(tmp_path / "saved", tmp_path / "again", "hf", fsync=False)
    same = [load_file(d / "model.safetensors") for d in (tmp_path / "again", source)]
    assert {n: t.shape for n, t in same[0].items()} == {n: t.shape for n, t in same[1].items()}


def test_a_text_only_checkpoint_says_so(tmp_path):
    _, source = zoo.saved("glm4v_moe")
    tensors = {n: t for n, t in load_file(source / "model.safetensors").items() if ".visual." not in n}
    hf.save(json.loads((source / "config.json").read_text()), tensors, tmp_path / "text")
    found = fmoe.inspect(tmp_path / "text")
    assert "no tensor is model.visual.*: the text model alone" in found["notes"]
    assert not found["problems"]
