"""Model types that Transformers builds with the class of another family: what it wrote comes back, with its numbers."""

from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from directories import load
from hf_blocks import alone, assert_parity

import fmoe
from fmoe.testing import same

THERE = [n for n in zoo.BORROWED if n in transformers.models.auto.configuration_auto.CONFIG_MAPPING]


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("original", [True, False])
def test_what_transformers_wrote_comes_back_and_computes_the_same(name: str, original: bool, tmp_path: Path) -> None:
    kind: Any = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    tiny = kind(**zoo.fitting(kind, zoo.COMMON) | zoo.LATENT)
    model = transformers.AutoModelForCausalLM.from_config(tiny, dtype=torch.float32, experts_implementation="eager")
    hf.randomise(model.eval(), 0)
    model.save_pretrained(tmp_path, save_original_format=original)
    tensors, adapter = load(tmp_path), fmoe.adapter(tmp_path)
    assert adapter.config is not None and adapter.config["model_type"] == name
    native = adapter.from_hf(tensors)
    same(adapter.resolve(tensors).to_hf(native), tensors)
    layers = [l for l, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    assert layers
    for l in layers:
        block, params, how = alone(model.model.layers[l].mlp, fmoe.subtree(native, f"model.layers.{l}.mlp"))
        assert_parity(block, params, adapter.moe_config, adapter.moe_config.dim, **how)
    corrected = [n for n in tensors if "bias" in n and ".mlp." in n]
    assert corrected and all(tensors[n].any() for n in corrected)
    if name == "sarvam_moe" and original:  # as published
        assert {n.rpartition(".")[2] for n in corrected} == {"expert_bias"}
