"""PEFT's matrices on the parts of a block: attached they give what they give merged, and what `fmoe.moe` does then."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_nn_surroundings import MATRICES, NORMED, WHOLE, drawn, tokens

import fmoe


@pytest.mark.parametrize("name", (*MATRICES, "gate.proj.weight"))
def test_lora_of_peft_on_every_matrix(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = replace(NORMED if name == "gate.proj.weight" else WHOLE, dtype="float32")
    part, _, tensor = f"1.{name}".rpartition(".")
    where = dict(target_modules=[], target_parameters=[f"1.{name}"]) if "experts." in name[:8] else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = where or dict(target_modules=[part])
        model = peft.get_peft_model(drawn(config), peft.LoraConfig(r=2, init_lora_weights=False, **how))
    y = model(tokens(config=config))
    y.square().sum().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    assert len(mine) == 2 and all(g is not None and g.any() for g in mine.values())
    merged = model.merge_and_unload()
    assert torch.allclose(merged(tokens(config=config)), y, rtol=1e-4, atol=1e-5)


SCALED: dict[str, Any] = {
    "plain": {}, "scale": dict(logit_scale=0.25), "by size": dict(scaled_logits=True), "cap": dict(logit_softcap=1.0),
    "scale and cap": dict(logit_scale=3.0, logit_softcap=2.0), "frozen": dict(logit_scale=0.25, train_gate=False),
}  # fmt: skip


@pytest.mark.parametrize("row", SCALED)
@pytest.mark.parametrize("config", [WHOLE, NORMED], ids=["gate", "gate.proj"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_a_gate_goes_through_the_scale_of_its_logits(dora: bool, config: fmoe.MoEConfig, row: str) -> None:
    peft = pytest.importorskip("peft")
    model = drawn(config := replace(config, dtype="float64", **SCALED[row]))
    right = model(tokens(config=config))
    part = "1.gate.proj" if config.router_norm else "1.gate"
    how = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=[part], use_dora=dora)
    tuned = peft.get_peft_model(model, how).double()
    y = tuned(tokens(config=config))
    merged = tuned.merge_and_unload()
    assert not torch.allclose(y, right) and torch.allclose(merged(tokens(config=config)), y, rtol=1e-9)
    weights = {n: t for n, t in merged[1].state_dict().items()}
    x = merged[0](tokens(config=config)).flatten(0, 1)
    assert torch.allclose(fmoe.moe(weights, x, config), y[0], rtol=1e-9)
