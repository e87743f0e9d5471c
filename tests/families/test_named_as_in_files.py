"""What is missing, or of another size, is named as the files call it: in every family, by every call."""

import json

import hf_zoo as zoo
import known_names
import pytest
from directories import load
from hf import MODELS, save

import fmoe
from fmoe.checkpoint.whole import spelling
from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.surplus import dropped_by_config


@pytest.mark.parametrize("name", [*MODELS, *zoo.MODELS])
def test_a_native_tensor_that_is_not_there_is_named_by_what_it_would_be_made_of(name):
    """Of a stack, its first part stands for the others."""
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    said, specs = known_names.in_files(cls, config, name, True)
    kind = FAMILIES[said["model_type"]]
    adapter = kind.adapter(said).resolve(specs)
    plan, spell = adapter.plan(specs), spelling(lambda: adapter.inverse)
    for sources, targets in plan.units():
        left = [n for n in plan.targets if n not in targets]
        for problem in gaps(kind, said, left, spell).problems:
            lost = [n for n in targets if n in problem.keys]
            assert not lost or {*problem.keys} & {*sources}, (lost, problem)
            assert not lost or any(repr(n) in problem.text for n in sources), (lost, problem)


def test_directories_are_refused_by_the_names_in_their_files(tmp_path):
    _, source = zoo.saved("mixtral")
    tensors, config = load(source), json.loads((source / "config.json").read_text())
    block = "model.layers.1.block_sparse_moe."
    save(config, {n: t for n, t in tensors.items() if not n.startswith(block + "experts.")}, tmp_path / "lost")
    save(config | {"vocab_size": 65}, tensors, tmp_path / "odd")
    for lost, named in ("lost", block + "experts.0.w2.weight"), ("odd", "model.embed_tokens.weight"):
        assert any(named in text for text in fmoe.inspect(tmp_path / lost)["problems"])
        for call in (fmoe.load, fmoe.verify, lambda p: fmoe.convert(p, tmp_path / "new")):
            with pytest.raises(fmoe.AdapterError) as error:
                call(tmp_path / lost)
            assert named in error.value.keys and named in str(error.value)


@pytest.mark.parametrize("to", ["hf", "vllm"])
def test_notes_name_what_a_class_that_is_not_named_would_lack_as_the_files_do(to, tmp_path):
    _, source = zoo.saved("mixtral")
    tensors, config = load(source), json.loads((source / "config.json").read_text())
    del config["architectures"]
    gate, other = "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"
    save(config, {n: t for n, t in tensors.items() if "block_sparse_moe.gate" not in n}, tmp_path / "hf")
    if to != "hf":
        fmoe.convert(tmp_path / "hf", tmp_path / to, to, fsync=False)
    notes = [n for n in fmoe.verify(tmp_path / to).notes if "names no class" in n]
    assert len(notes) == 1 and repr(gate) in notes[0] and repr(other) not in notes[0], notes


def test_notes_name_what_a_config_drops_as_the_files_do():
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False}
    layers = {"model.layers": {0: {"self_attn.q_proj.weight", "self_attn.q_proj.bias"}}}
    notes = dropped_by_config(config, layers, "model.layers", 1, lambda name: [f"in.files.{name}"])
    assert len(notes) == 1 and notes[0].startswith("'in.files.model.layers.0.self_attn.q_proj.bias': ")


def test_zero_experts_in_one_tensor_are_named_with_what_to_do(tmp_path):
    model, published = zoo.saved("longcat_flash")
    model.save_pretrained(tmp_path, save_original_format=False)
    name, text = "model.layers.0.mlp.experts.gate_up_proj", "8 experts and 4 zero experts in one tensor"
    for call in (fmoe.load, fmoe.verify, lambda path: fmoe.convert(path, tmp_path / "new")):
        with pytest.raises(fmoe.AdapterError, match=rf"{text}.* save_original_format=False\. Fix: .*") as error:
            call(tmp_path)
        assert name in error.value.keys
    model.save_pretrained(tmp_path / "published")
    assert fmoe.load(tmp_path / "published").keys() == fmoe.load(published).keys()
