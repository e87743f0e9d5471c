"""A wrong checkpoint never converts: without a config, of several faults at once, of halves and mixed layouts."""

import hf_synthetic as synthetic
import pytest
import torch
from wrong_checkpoints import drop, duplicate, orphan_scale, renumber, retype, stray, suffix, transpose

import fmoe


@pytest.mark.parametrize("model_type", ["per_expert", "per_expert_non_gated", "qwen3_moe"])
def test_without_a_config_the_tensors_themselves_must_agree(model_type):
    gates = () if "non_gated" in model_type else ("gate",)
    good = {
        f"layers.{l}.mlp.experts.{e}.{p}_proj.weight": torch.randn(*((4, 3) if p == "down" else (3, 4)))
        for l in range(2)
        for e in range(3)
        for p in (*gates, "up", "down")
    }
    adapter = fmoe.adapter(model_type)
    assert adapter.from_hf(good)["layers.0.mlp.experts.down_projs"].shape == (3, 3, 4)
    for mutate in (drop, transpose, retype, suffix, orphan_scale, renumber, stray, duplicate):
        for key in (
            f"layers.1.mlp.experts.1.{gates[0] if gates else 'up'}_proj.weight",
            "layers.1.mlp.experts.1.down_proj.weight",
        ):
            wrong = dict(good)
            named = mutate(wrong, key)
            with pytest.raises(fmoe.AdapterError) as error:
                adapter.from_hf(wrong)
            assert set(named) <= set(error.value.keys), (mutate, named, str(error.value))


def test_all_problems_are_told_at_once():
    config, tensors = synthetic.deepseek_v3()
    wrong = dict(tensors)
    expected = []
    for layer, mutate in ((1, drop), (2, transpose), (3, suffix)):
        expected += mutate(wrong, f"model.layers.{layer}.mlp.experts.1.gate_proj.weight")
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("deepseek_v3", config).from_hf(wrong)
    assert isinstance(error.value, ValueError) and len(error.value.problems) == 3
    assert set(expected) <= set(error.value.keys)


@pytest.mark.parametrize("also", ["gate_proj.weight_scale_inv", "gate_proj.bias"])
def test_step3p5_names_are_anchored_at_their_end(also):
    """The seed took `moe.gate_proj.weight_scale_inv` for the weight (reference-behaviour 12, 36)."""
    config, tensors = synthetic.step3p5()
    name = f"model.layers.2.moe.{also}"
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("step3p5", config).from_hf(tensors | {name: torch.ones(8)})
    assert name in error.value.keys


def test_a_lone_half_and_two_heads_are_refused():
    config, tensors = synthetic.step3p5()
    lone = {n: t for n, t in tensors.items() if n != "model.layers.2.moe.up_proj.weight"}
    with pytest.raises(fmoe.AdapterError, match=r"model\.layers\.2\.moe\.up_proj\.weight"):
        fmoe.adapter("step3p5", config).from_hf(lone)
    config, tensors = synthetic.qwen3_5_moe()
    two = tensors | {"model.lm_head.weight": tensors["lm_head.weight"]}
    with pytest.raises(fmoe.AdapterError, match=r"model\.lm_head\.weight"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(two)


def test_mixed_layouts_are_refused_with_a_key_of_each():
    config, fused = synthetic.qwen3_5_moe()
    key = "model.language_model.layers.0.mlp.experts.0.gate_proj.weight"
    with pytest.raises(fmoe.AdapterError, match="mixed layouts") as error:
        fmoe.adapter("qwen3_5_moe", config).from_hf(fused | {key: torch.zeros(144, 160)})
    assert key in error.value.keys and any("gate_up_proj" in k for k in error.value.keys)
