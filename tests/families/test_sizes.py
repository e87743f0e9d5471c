"""A size that the config says and tensors have not is refused by name, in every class that Transformers knows."""

import copy
import json

import hf
import hf_zoo as zoo
import known_names
import pytest
import torch
from directories import load
from hf import save

import fmoe
from fmoe.families.kind import as_dict
from fmoe.families.sizes import known_sizes, odd_sizes

NAMES = [*hf.MODELS, *zoo.MODELS]
UNBUILT = {"dbrx", "dots1", "hunyuan_v1_moe", "lfm2_moe", "longcat_flash", "deepseek_ocr2_text"}
UNBUILT |= {"qwen4_exp", "qwen4_exp_text"}
"""Classes whose own default config makes no model, or not without memory."""


def said_and_native(name, config):
    cls, _ = known_names.base(name)
    config.architectures = [cls.__name__]
    said = json.loads(config.to_json_string())
    return said, known_names.sized(cls, config, name, name == "longcat_flash")


def of(config, field):
    """The part of a config that has a field, and the field's name there."""
    part, _, name = field.rpartition(".")
    if part:
        return config.get(part, {}), name
    return (config["text_config"] if isinstance(config.get("text_config"), dict) else config), name


def says(config, field):
    part, name = of(config, field)
    return type(part.get(name)) is int


@pytest.mark.parametrize("name", NAMES)
def test_each_number_that_sizes_follow_is_missed_where_tensors_have_another_and_no_other(name):
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    said, native = config.to_dict(), known_names.sized(cls, config, name, True)
    assert not [*odd_sizes(said, as_dict(said), native)]
    formulas = known_sizes()[said["model_type"]]
    assert formulas
    for formula in formulas:
        fields = [f for f in formula.split("*") if not f.isdigit()]
        if "+" in formula or "/" in formula or not all(says(said, f) for f in fields):
            continue
        other = copy.deepcopy(said)
        part, name = of(other, fields[-1])
        part[name] += 1
        assert any(f"{fields[-1]} {part[name]}" in p.text for p in odd_sizes(other, as_dict(other), native)), formula


@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNBUILT])
def test_the_sizes_that_transformers_takes_by_itself_are_no_problem(name):
    said, native = said_and_native(name, known_names.base(name)[0].config_class())
    assert not [*odd_sizes(said, as_dict(said), native)]


@pytest.mark.parametrize(("field", "named"), [
    ("vocab_size", "model.embed_tokens.weight"), ("num_key_value_heads", "model.layers.0.self_attn.k_proj.weight"),
    ("intermediate_size", "model.layers.1.mlp.up_proj.weight"),
])  # fmt: skip
def test_a_directory_whose_config_says_another_size_is_read_by_nothing(field, named, tmp_path):
    _, source = zoo.saved("qwen3_moe")
    tensors, config = load(source), json.loads((source / "config.json").read_text())
    save(config | {field: config[field] + 1}, tensors, tmp_path / "hf")
    assert any(field in text for text in fmoe.inspect(tmp_path / "hf")["problems"])
    for call in (
        fmoe.load,
        fmoe.verify,
        lambda p: fmoe.convert(p, tmp_path / "new"),
        lambda p: fmoe.convert(p, tmp_path / "new", "automodel"),
    ):
        with pytest.raises(fmoe.AdapterError, match=f"config.json has .*{field} {config[field] + 1}") as error:
            call(tmp_path / "hf")
        assert named in error.value.keys
    assert not (tmp_path / "new").exists()
    native = fmoe.load(source)
    native["model.embed_tokens.weight"] = torch.ones(70, 32)  # grown, and the config is not
    with pytest.raises(fmoe.AdapterError, match="70 in dimension 0, and config.json has vocab_size 64"):
        fmoe.save(native, tmp_path / "new", fmoe.adapter(source), fsync=False)
