"""A size that the config says and tensors have not is refused by name, in every class that Transformers knows."""

import copy
import json
import re

import hf
import hf_zoo as zoo
import known_names
import known_refused
import known_sizes as known_made
import pytest
import torch
from directories import load
from hf import save
from known_saved import originals

import fmoe
from fmoe.families.formula import fields, value
from fmoe.families.kind import as_dict
from fmoe.families.known import with_text
from fmoe.families.sizes import PARTS, known_sizes, odd_sizes

NAMES = [*hf.MODELS, *zoo.MODELS]
UNBUILT = {"dbrx", "dots1", "hunyuan_v1_moe", "lfm2_moe", "longcat_flash", "deepseek_ocr2_text", "deepseek_ocr2"}
UNBUILT |= {"qwen4_exp", "qwen4_exp_text"}
"""Classes whose own default config makes no model, or not without memory."""


def said_and_native(name, config):
    cls, _ = known_names.base(name)
    config.architectures = [cls.__name__]
    said = json.loads(config.to_json_string())
    return said, known_names.sized(cls, config, name, name == "longcat_flash")


def places(config, field):
    """Where a config says what a formula calls by this name: of one layer's, all that each layer has of its own."""
    *path, name = re.findall(r"\w+", field)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    at = config if path and path[0] in PARTS else text
    for part in path:
        at = at.get(part, {})
    if name == "l":
        return [(at, l) for l in range(len(at))]
    each = at.get("per_layer_config") if isinstance(at, dict) else None
    return [(at, name if isinstance(at, dict) else int(name)), *((own, name) for own in (each or {}).values())]


def moved(config, field, to=lambda n: n + 1):
    """The config with one more there, and what a problem says of that."""
    other, field = copy.deepcopy(config), field.replace("[l - 1]", "[l]")
    there = lambda at, k: k in at if isinstance(at, dict) else k < len(at)
    found = [(at, k) for at, k in places(other, field) if there(at, k) and isinstance(at[k], int)]
    for at, k in found:
        at[k] = to(at[k]) if type(at[k]) is int else not at[k]
    return other, [f"{field.replace('[l]', f'[{k}]')} {json.dumps(at[k])}" for at, k in found]


def here(config, dims):
    """Whether layers of one of these kinds are in this config, or its tensors are of no kind."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    kinds = [hit.groups() if (hit := re.match(r"#(\w+)=(\w+)", at[0])) else () for at in dims]
    return any(not kind or kind[1] in map(str, text.get(kind[0], ())) for kind in kinds)


def in_use(formula, field, config):
    """Whether one more there is another size of the first layer: else it is of layers that a list gives another."""
    return value(formula, with_text(config)) != value(formula, with_text(moved(config, field)[0]))


@pytest.mark.parametrize("name", ["deepseek_ocr2", "unlimited_ocr"])
def test_layers_that_a_list_has_and_those_that_it_has_not_are_compared_by_sizes_of_their_own(name):
    cls, config = known_names.base(name)
    config.architectures, sam = [cls.__name__], config.vision_config.sam_config
    sam.num_hidden_layers, sam.global_attn_indexes = 3, [1]
    said, native = config.to_dict(), known_names.sized(cls, config, name, True)
    assert not [*odd_sizes(said, as_dict(said), native)]
    for field, wrong, layers in (
        ("window_size", sam.window_size + 1, {"0", "2"}),
        ("image_size", 2 * sam.image_size, {"1"}),
        ("global_attn_indexes", [2], {"1", "2"}),
    ):
        other = copy.deepcopy(said)
        other["vision_config"]["sam_config"][field] = wrong
        problems = [p for p in odd_sizes(other, as_dict(other), native) if "rel_pos" in p.text]
        assert {n.split(".")[3] for p in problems for n in p.keys} == layers
        assert all(f"sam_config.{field} {wrong}" in p.text for p in problems)


@pytest.mark.parametrize("name", NAMES)
def test_each_number_that_sizes_follow_is_missed_where_tensors_have_another_and_no_other(name):
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    said, classes = config.to_dict(), filter(None, (cls, known_names.two_parts(name)))
    forms = [known_names.sized(of, config, name, published) for of in classes for published in originals(name)]
    assert not [p for native in forms for p in odd_sizes(said, as_dict(said), native)]
    found = known_sizes()[said["model_type"]]
    assert found
    for formula, dims in found.items():
        for field in fields(formula) if here(said, dims) else ():
            if " if l in " in formula and not in_use(formula, field, said):
                continue
            for to in (lambda n: n + 1, lambda n: 0):  # what is divided may be the same of one more
                other, told = moved(said, field, to)
                if told and (f"//{field}" not in formula if to(1) == 0 else "//" not in formula):
                    problems = (p.text for native in forms for p in odd_sizes(other, as_dict(other), native))
                    assert any(t in p for p in problems for t in told), (formula, field, told)


def test_a_flag_that_a_size_follows_is_in_the_data():
    told = {name: {f for f in formulas if " if " in f} for name, formulas in known_sizes().items()}
    assert any("gating" in f for f in told["laguna"])


CONDITIONAL = {t: [f for f in formulas if " or " in f or " if " in f] for t, formulas in known_sizes().items()}


@pytest.mark.parametrize("name", [n for n in NAMES if CONDITIONAL[known_names.family_type(n)]])
def test_a_number_that_a_config_leaves_out_is_what_its_class_takes_it_for(name):
    cls, config = known_names.base(name)
    config.architectures, tried = [cls.__name__], 0
    for field in {f for told in CONDITIONAL[known_names.family_type(name)] for f in fields(told)[:2]}:
        said = config.to_dict()
        for at, k in places(said, field) if "[" not in field else ():
            at.pop(k, None)
        theirs = known_refused.sizes(name, said)
        if theirs is not None:
            native = known_names.sized(cls, type(config).from_dict(copy.deepcopy(said)), name, True)
            assert not [*odd_sizes(said, as_dict(said), native)], field
            tried += 1
    assert tried


def by_kind(name):
    """What a list may say of a layer where a tensor's size follows from that: {(field, word)}."""
    found = {}
    for formula, dims in known_sizes()[known_names.family_type(name)].items():
        for template, k in dims:
            if hit := re.match(r"#(\w+)=(\w+)\.(.*)", template):
                found.setdefault((hit[1], hit[3], k), {}).setdefault(formula, []).append(hit[2])
    return {(field, w) for (field, _, _), told in found.items() if len(told) > 1 for ws in told.values() for w in ws}


@pytest.mark.parametrize("name", [n for n in NAMES if by_kind(n)])
def test_layers_that_are_said_to_be_of_another_kind_are_missed_by_their_sizes(name):
    cls, config = known_names.base(name)
    config.architectures, missed = [cls.__name__], 0
    said, native = config.to_dict(), known_names.sized(cls, config, name, True)
    for field, word in sorted(by_kind(name)):
        other = copy.deepcopy(said)
        (other["text_config"] if known_names.text_of(config) is not config else other)[field] = [
            int(word) if word.isdigit() else word
        ] * 2
        theirs = known_names.sized(cls, type(config).from_dict(copy.deepcopy(other)), name, True)
        assert not [*odd_sizes(other, as_dict(other), theirs)]
        odd = {n for n in native.keys() & theirs if "layers." in n and native[n].shape != theirs[n].shape}
        assert odd <= {n for p in odd_sizes(other, as_dict(other), native) for n in p.keys}
        missed += len(odd)
    assert missed


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4v_moe", "jetmoe", "muse_spark_text", "mellum"])
def test_the_sizes_that_are_kept_are_those_that_the_script_reads_off_the_class(name):
    """Of a few: also a head's width that no field says, and that a config may."""
    assert known_made.formulas(name) == known_sizes()[known_names.family_type(name)]
