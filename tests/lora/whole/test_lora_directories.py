"""LoRA matrices in directories: checked before they are written and as they are read, against class and config too."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_cases import PREFIX, adapter_of, forms, native
from peft_cases import FILE, LAYERS, MODELS, WARNS, build, linear, modules, trained
from safetensors.torch import save_file
from tiny import FAMILIES as KINDS

import fmoe
from fmoe.lowrank.complete import STACKED
from fmoe.lowrank.derive import CURRENT
from fmoe.lowrank.stage import is_lora
from fmoe.testing import same

pytestmark = WARNS
HYBRID = pytest.mark.parametrize("name", LAYERS)
SLOW = [
    pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in (*LAYERS, "longcat_flash")
]  # whose experts PEFT wraps so that none can tell


def test_a_directory_is_checked_before_it_is_written_and_as_it_is_read(tmp_path):
    adapter = adapter_of("qwen3_moe")
    params = native("qwen3_moe") | {f"{PREFIX}layers.3.self_attn.q_proj.lora_B.weight": torch.randn(10, 2)}
    config = fmoe.lora.save(params, tmp_path / "a", adapter, lora_alpha=4, base="b")
    assert config.target_modules == ("model.layers.3.self_attn.q_proj",) and config.base == "b" and config.r == 2
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    same(tuned.params, params)
    assert tuned.config == replace(config, other=tuned.config.other)
    assert set(tuned.scales.values()) == {2.0} and len(tuned.scales) == 3
    with pytest.raises(fmoe.AdapterError, match="is there already: pass force=True"):
        fmoe.lora.save(params, tmp_path / "a", adapter)
    fmoe.lora.save(params, tmp_path / "a", adapter, config, force=True)
    same(fmoe.lora.load(tmp_path / "a", adapter).params, params)
    for wrong, how, why in (
        (params | {"model.norm.weight": torch.ones(2)}, {}, "no LoRA tensors"),
        (params, dict(config=replace(config, r=4)), "rank 2, and adapter_config.json says"),
        (params, dict(config=replace(config, target_parameters=())), "name none of its parameters"),
        ({n: t for n, t in params.items() if not n.endswith("_A")}, {}, "stands without"),
    ):
        with pytest.raises(fmoe.AdapterError, match=why):
            fmoe.lora.save(wrong, tmp_path / "c", adapter, **how)
        assert not (tmp_path / "c").exists()
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    for old, new, why in (
        ('"LORA"', '"LOHA"', "peft_type 'LOHA'"),
        ('"r": 2', '"r": 3', "rank 2, and adapter_config.json says"),
        ('"r": 2', '"r": 0', "expected a positive int"),
        ('"bias"', '"use_dora": true, "bias"', "use_dora=True"),
        ('"r": 2', '"r": 2, "r": 2', "stands there twice"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(text.replace(old, new))
        with pytest.raises(fmoe.AdapterError, match=why):
            fmoe.lora.load(tmp_path / "a", adapter)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(fmoe.AdapterError, match="adapter_config.json is missing"):
        fmoe.lora.load(tmp_path / "a", adapter)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("version", ["0.18.1", CURRENT])
def test_every_family_through_a_directory(name, version, tmp_path):
    for form in forms(name):
        adapter = adapter_of(name, lora=form, peft_version=version)
        params = {n: t for n, t in native(name, form).items() if "self_attn" not in n}
        params = {n: t for n, t in params.items() if "gate_and_up" in n or form == "peft"}
        fmoe.lora.save(params, tmp_path / form, adapter)
        tuned = fmoe.lora.load(tmp_path / form, adapter_of(name))
        same(tuned.params, params)
        same(tuned.adapter.to_hf(tuned.params), adapter.to_hf(params))
        assert tuned.config.peft_version == version and set(tuned.scales.values()) == {16.0}


def test_is_lora():
    assert (
        is_lora("lora_down_A")
        and is_lora("a.lora_B.weight")
        and not is_lora("a.exploration_A")
        and not is_lora("lora.w")
    )
    with pytest.raises(fmoe.AdapterError, match="carries no LoRA matrices"):
        fmoe.lora.save({"a.lora_A.weight": torch.ones(1, 1)}, "nowhere", fmoe.keep("{rest}"))


@HYBRID
def test_a_module_lost_in_one_layer_of_several_of_its_kind_is_missed(name, tmp_path):
    adapter, files = trained(name, tmp_path)
    fmoe.lora.load(tmp_path, adapter)
    for module in modules(files):
        save_file({n: t for n, t in files.items() if not n.startswith(f"{module}.lora_")}, tmp_path / FILE)
        with pytest.raises(fmoe.AdapterError, match="no matri|stands alone|lora") as error:
            fmoe.lora.load(tmp_path, adapter)
        assert any(re.sub(r"\.base_layer$", "", module) in key for key in error.value.keys), module


@HYBRID
def test_a_whole_layer_that_is_lost_is_missed_where_the_config_says_its_kind(name, tmp_path):
    adapter, files = trained(name, tmp_path)
    for layer in range(LAYERS[name]["num_hidden_layers"]):
        save_file({n: t for n, t in files.items() if f".layers.{layer}." not in n}, tmp_path / FILE)
        with pytest.raises(fmoe.AdapterError, match="no matrices") as error:
            fmoe.lora.load(tmp_path, adapter)
        assert any(f".layers.{layer}." in key for key in error.value.keys)


@HYBRID
@pytest.mark.parametrize("how", ["layers", "regex", "excluded", "parts"])
def test_layers_that_the_config_leaves_out_are_not_missed(how, name, tmp_path):
    said: dict[str, Any] = {
        "layers": dict(layers_to_transform=[0, 1]),
        "regex": dict(target_modules=rf".*layers\.[013]\..*({'|'.join(linear(name))})"),
        "excluded": dict(exclude_modules=r".*layers\.[23]\..*_proj"),
        "parts": dict(target_modules=[n for n in ("o_proj", "k_proj", "w2") if n in linear(name)]),
    }[how]
    adapter, files = trained(name, tmp_path, **said)
    assert files and fmoe.lora.load(tmp_path, adapter).params


@HYBRID
@pytest.mark.parametrize("layer", range(4))
def test_a_target_is_missed_where_some_layer_has_it_and_only_there(layer, name, tmp_path):
    """PEFT asks that one target finds a module, not that all do: others are of other kinds of layers, or models."""
    elsewhere = ["gate_proj", "qkv_proj", "wqkv", "in_proj_nowhere"]
    said = dict(target_modules=sorted({*linear(name), *elsewhere}), layers_to_transform=[layer])
    adapter, files = trained(name, tmp_path, **said)
    assert fmoe.lora.load(tmp_path, adapter).params
    for target in sorted({m.rpartition(".")[2] for m in modules(files)}):
        left = {n: t for n, t in files.items() if f".{target}.lora_" not in n}
        save_file(left or {"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / FILE)
        with pytest.raises(fmoe.AdapterError, match="no matrix is for it|no matrices|one wrapper") as error:
            fmoe.lora.load(tmp_path, adapter)
        named = [target] if target in said["target_modules"] else ["down_proj", "gate_up_proj"]
        assert any(n in str(error.value) for n in named)


@pytest.mark.parametrize("name", [*LAYERS, *SLOW])
def test_nothing_is_missed_of_what_peft_wrote(name, tmp_path):
    """Of every family, whatever is told of its base: also nothing at all, where layers may be of any kind."""
    adapter, files = trained(name, tmp_path)
    fmoe.lora.load(tmp_path, adapter)
    bare = fmoe.adapter(build(name).config.model_type, {})
    plain = {n: t for n, t in files.items() if not STACKED.search(n)}  # how many those are is said nowhere
    save_file(plain, tmp_path / FILE)
    said = json.loads((tmp_path / "adapter_config.json").read_text()) | {"target_parameters": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    fmoe.lora.load(tmp_path, bare)
