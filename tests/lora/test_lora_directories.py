"""LoRA matrices in directories: checked before they are written, and as they are read."""

from dataclasses import replace

import pytest
import torch
from lora_cases import PREFIX, adapter_of, forms, native
from tiny import FAMILIES as KINDS

import fmoe
from fmoe.lowrank.derive import CURRENT
from fmoe.lowrank.stage import is_lora
from fmoe.testing import same


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
