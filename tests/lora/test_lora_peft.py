"""LoRA against PEFT itself: what it wrote is read with its meaning, what we write it loads, and merged numbers agree.

Every model type of Transformers that PEFT can wrap; and a few trained, saved, loaded, merged and run both ways.
"""

import json

import peft
import pytest
import torch
from peft_cases import (
    ALONE,
    ALPHA,
    MODELS,
    WARNS,
    E,
    R,
    adapter_of,
    build,
    close,
    config_of,
    drawn,
    logits,
    merged_model,
    parameters,
    train,
)
from safetensors.torch import load_file

import fmoe
from fmoe.lowrank.stage import UNWRAPPED
from fmoe.testing import same

pytestmark = WARNS
SQUARE = {  # U == D, I == D, and both for two matrices that look alike
    "qwen3_moe": dict(moe_intermediate_size=16),
    "mixtral": dict(intermediate_size=32),
    "gpt_oss": dict(intermediate_size=32),
    "nemotron_h": dict(moe_intermediate_size=32),
}
TRAINED = [(name, {}) for name in ("qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "llama4_text")]
TRAINED += list(SQUARE.items())


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ALONE])
def test_what_peft_wraps_has_our_meaning(name):
    """PEFT's merged weights are ours, for every model type; a form that was found comes back bit for bit."""
    model = build(name)
    adapter = adapter_of(model)
    before = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    wrapped = drawn(model, parameters(adapter))
    files = peft.get_peft_model_state_dict(wrapped)
    adapter = adapter_of(model, lora_r=R)
    lora = adapter.from_hf(files)
    same(adapter.to_hf(lora), files)
    merged = adapter.from_hf(wrapped.merge_and_unload().state_dict())
    ours = fmoe.lora.merge(before, lora, ALPHA / R)
    assert any(n.endswith("gate_and_up_projs") for n in ours)
    for n in merged:
        close(ours[n].float(), merged[n].float(), 1e-6)
        stacked = n.endswith(("gate_and_up_projs", "down_projs"))
        assert torch.equal(before[n], merged[n]) != stacked, n


@pytest.mark.parametrize("name", ALONE)
def test_what_peft_cannot_wrap_is_said(name):
    with pytest.raises(fmoe.AdapterError, match=f"PEFT cannot wrap these experts: .*{ALONE[name]}"):
        adapter_of(build(name), lora="peft")
    assert ("zero" in ALONE[name]) == (name in UNWRAPPED)


@pytest.mark.parametrize(("name", "overrides"), TRAINED, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "-")
def test_trained_saved_loaded_merged_and_written_again(name, overrides, tmp_path):
    wrapped = peft.get_peft_model(build(name, **overrides), config_of(parameters(adapter_of(build(name)))))
    train(wrapped)
    wrapped.eval()
    wrapped.save_pretrained(tmp_path / "peft")
    base = adapter_of(build(name, **overrides))
    tuned = fmoe.lora.load(tmp_path / "peft", base)
    theirs, plain = logits(wrapped), logits(build(name, **overrides))
    assert (theirs - plain).abs().max() > 1e-2 * plain.abs().max(), "the step changed nothing: the test is void"
    close(logits(merged_model(name, overrides, tuned.params, tuned.scales)), theirs)
    # ours, in PEFT
    other = {
        n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(3)) for n, t in tuned.params.items()
    }
    fmoe.lora.save(other, tmp_path / "ours", base, lora_alpha=ALPHA)
    again = peft.PeftModel.from_pretrained(build(name, **overrides), tmp_path / "ours").eval()
    loaded = peft.get_peft_model_state_dict(again)
    same(loaded, load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    numbers = logits(again)
    close(logits(merged_model(name, overrides, other, ALPHA / R)), numbers)
    assert (numbers - theirs).abs().max() > 1e-3
    close(logits(again.merge_and_unload()), numbers)
    # and back, with their config: the very tensors and the same JSON
    fmoe.lora.save(tuned.params, tmp_path / "back", tuned.adapter, tuned.config)
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "back")]
    same(files[1], files[0])
    said = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("peft", "back")]
    said[0]["target_parameters"] = sorted(said[0]["target_parameters"])
    assert said[1] == said[0]


@pytest.mark.parametrize(("name", "overrides"), [t for t in TRAINED if t[0] != "llama4_text"], ids=str)
def test_experts_with_our_matrices_are_those_that_peft_wrapped(name, overrides):
    model = build(name, **overrides)
    adapter = adapter_of(model)
    weights = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    wrapped = drawn(model, parameters(adapter))
    lora = adapter.from_hf(peft.get_peft_model_state_dict(wrapped))
    prefix = next(n for n in weights if n.endswith(".gate_and_up_projs")).rpartition(".")[0]
    module = wrapped.get_submodule(f"base_model.model.{prefix}")
    config = adapter.moe_config
    made = torch.Generator().manual_seed(5)
    x = torch.randn(9, config.expert_dim, generator=made)
    K = config.n_activated_experts
    indices = torch.rand(9, E, generator=made).argsort(-1)[:, :K]
    routing = torch.rand(9, K, generator=made)
    with torch.no_grad():
        theirs = module(x, indices, routing).view_as(x)
    mine = fmoe.subtree(lora, f"base_model.model.{prefix}")
    params = fmoe.subtree(weights, prefix) | mine
    ours = fmoe.experts(params, x, fmoe.Routing(indices, routing), config, lora_alpha=ALPHA)
    close(ours, theirs)
    plain = fmoe.experts(fmoe.subtree(weights, prefix), x, fmoe.Routing(indices, routing), config)
    assert (plain - theirs).abs().max() > 1e-2 * theirs.abs().max()
