"""Of every model PEFT's adapter of all experts is read and written again; without those of a layer it is neither."""

import json
import re

import peft
import pytest
import torch
from peft_cases import ALONE, FILE, MODELS, WARNS, adapter_of, build, parameters
from safetensors.torch import load_file, save_file

import fmoe

pytestmark = WARNS
LAYER = re.compile(r"\b(?:layers|h|blocks?)\.(\d+)\.")
PLAIN = dict(num_experts=2, decoder_sparse_step=1, num_hidden_layers=3, hidden_size=6, moe_intermediate_size=5)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ALONE])
def test_a_layers_experts_lost_are_missed_by_load_and_save_whatever_tells_of_the_base(name, tmp_path):
    """Also where layers are of several kinds of attention, and where those with experts are few."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    targets = parameters(adapter_of(model))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    wrapped.save_pretrained(tmp_path / "adapter")
    files = load_file(tmp_path / "adapter" / FILE)
    made = fmoe.adapter(tmp_path / "base")
    bases = {"directory": (tmp_path / "base",), "adapter": (made,), "type": (config["model_type"], config)}
    for base in bases.values():
        tuned = fmoe.lora.load(tmp_path / "adapter", *base)
        fmoe.lora.save(tuned.params, tmp_path / "again", tuned.adapter, tuned.config, force=True)
        again = load_file(tmp_path / "again" / FILE)
        assert again.keys() == files.keys() and all(torch.equal(again[n], t) for n, t in files.items())
    of = lambda name: (*LAYER.findall(name), "")[0] if not re.search("vision|visual|audio", name) else ""
    layers = sorted({of(n) for n in files} - {""})
    for lost in layers if len(layers) > 1 else ():
        save_file({n: t for n, t in files.items() if of(n) != lost}, tmp_path / "adapter" / FILE)
        for base in bases.values():
            with pytest.raises(fmoe.AdapterError, match="no matri") as error:
                fmoe.lora.load(tmp_path / "adapter", *base)
            assert any(of(key) == lost for key in error.value.keys)
        with pytest.raises(fmoe.AdapterError, match="no matri") as error:
            less = {n: t for n, t in tuned.params.items() if of(n) != lost}
            fmoe.lora.save(less, tmp_path / "less", tuned.adapter, tuned.config)
        assert any(of(key) == lost for key in error.value.keys) and not (tmp_path / "less").exists()


@pytest.mark.parametrize("lost", ["layers.1.", "layers.0.self_attn", "self_attn", "experts"])
def test_save_writes_nothing_that_load_would_refuse(lost, tmp_path):
    """Of matrices and a config that is not of them; without one it is made, of what is there."""
    adapter = fmoe.adapter("qwen3_moe", PLAIN)
    stacks = [f"model.layers.{l}.mlp.experts.{n}" for l in range(3) for n in ("gate_and_up_projs", "down_projs")]
    lora = fmoe.lora.init({n: torch.ones(2, 6, 10) if "gate" in n else torch.ones(2, 5, 6) for n in stacks}, r=2)
    queries = [f"model.layers.{l}.self_attn.q_proj.lora_{m}.weight" for l in range(3) for m in "AB"]
    lora |= {n: torch.ones(2, 6) if "_A." in n else torch.ones(6, 2) for n in queries}
    words = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    config = fmoe.lora.LoraConfig(r=2, target_modules=("q_proj",), target_parameters=words)
    fmoe.lora.save(lora, tmp_path / "whole", adapter, config)
    less = {n: t for n, t in lora.items() if lost not in n}
    with pytest.raises(fmoe.AdapterError, match="no matri"):
        fmoe.lora.save(less, tmp_path / "less", adapter, config)
    fmoe.lora.save(less, tmp_path / "less", adapter)
    assert len(fmoe.lora.load(tmp_path / "less", adapter).params) == len(less)


def test_save_in_another_form_than_the_config_says_is_refused(tmp_path):
    lora = fmoe.lora.init({"model.layers.0.mlp.experts.down_projs": torch.ones(2, 5, 6)}, r=2)
    config = PLAIN | dict(num_hidden_layers=1)
    wrapped = fmoe.lora.save(lora, tmp_path / "peft", fmoe.adapter("qwen3_moe", config))
    with pytest.raises(fmoe.AdapterError, match=r"experts\.down_proj"):
        fmoe.lora.save(lora, tmp_path / "one", fmoe.adapter("qwen3_moe", config, lora="per-expert"), wrapped)
