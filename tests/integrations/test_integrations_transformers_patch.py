"""L0, on the installed Transformers: what a patch binds, reports, nests with, and undoes."""

import copy
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from eager_parity import Calls, expert_modules, far
from torch import nn

import fmoe
from fmoe.integrations import transformers as integration

integration.register()


def test_L0_the_report_tells_what_is_bound_and_what_is_not_and_why() -> None:
    model, inputs = zoo.build("jetmoe")
    report = fmoe.patch(model)
    how = "its router's logits, one softmax over the K that were chosen, a bias on the sum"
    why = "a mixture of attention: between its two products lies attention"
    assert str(report).splitlines() == [
        "bound to fmoe: 2",
        *(f"  model.layers.{i}.mlp (JetMoeMoE): {how}" for i in range(2)),
        "not bound: 2",
        *(f"  model.layers.{i}.self_attention.experts (JetMoeMoA): {why}" for i in range(2)),
    ]
    report = fmoe.patch(zoo.build("gpt_oss")[0])
    assert report.bound[1] == (
        "model.layers.1.mlp.experts", "GptOssExperts", "quick_geglu(activation_alpha=1.5, activation_limit=1.25)"
    )  # fmt: skip
    assert str(report).count("\n") == 2
    assert report._repr_html_().count("<tr>") == len(report.bound) and "GptOssExperts" in report._repr_html_()


def test_L0_patches_nest_and_undo_in_turn(calls: Calls) -> None:
    for name in ("mixtral", "longcat_flash"):
        model, inputs = zoo.build(name)
        state = [dict(m.__dict__) for m in model.modules()]
        first, second = fmoe.patch(model), fmoe.patch(model, backend="loop")
        twin = copy.deepcopy(model)
        zoo.output(model, inputs)
        for report in (second, first):
            report.undo()
            report.undo()
        kept = [{k: v for k, v in m.__dict__.items() if k != "_fmoe_gate"} for m in model.modules()]
        assert all(now.keys() == was.keys() for now, was in zip(kept, state, strict=True))
        calls.params.clear()
        expected = zoo.output(model, inputs)
        assert not calls.params
        with torch.no_grad():  # the copy is bound to its own parameters
            for p in model.parameters():
                p.zero_()
        assert far(zoo.output(twin, inputs), expected) <= 1e-5 and calls.params


def test_L0_a_forward_that_something_else_replaced_is_not_overwritten() -> None:
    model, _ = zoo.build("jetmoe")
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"the forward of 'model.layers.1.mlp' \(JetMoeMoE\) is .*lambda.* already"):
        fmoe.patch(model)
    assert "forward" not in model.model.layers[0].mlp.__dict__


def test_L0_hooks_and_wrappers_of_a_decorated_module_stay(calls: Calls) -> None:
    """As expert parallelism and accelerate wrap a module's forward: what they wrap still asks which one to run."""
    model, inputs = zoo.build("mixtral")
    module: Any = expert_modules(model)[0]
    inner, seen = module.forward, []
    module.forward = lambda *args: seen.append(len(args)) or inner(*args)
    expected = zoo.output(model, inputs)
    report = fmoe.patch(model)
    assert far(zoo.output(model, inputs), expected) <= 1e-5 and len(calls.params) == 2 and seen == [3, 3]
    report.undo()


def test_L0_experts_of_classes_that_nobody_knows_are_told(calls: Calls) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])

    model, inputs = zoo.build("mixtral")
    model.model.layers[0].other = Mine()
    report = fmoe.patch(model)
    assert [(b.name, b.told) for b in report.passed] == [
        ("model.layers.0.other.experts", "a class that fmoe does not know")
    ]
    report.undo()
    with pytest.raises(ValueError, match=r"layers.0.other.experts \(ModuleList\) would not run through fmoe: Tran"):
        model.set_experts_implementation("fmoe")
    with pytest.raises(ValueError, match="Mine has no experts that fmoe can bind\nbound to fmoe: 0\nnot bound: 1"):
        fmoe.patch(Mine())
    with pytest.raises(ValueError, match="backend is 'tritn', expected one of loop, torch_mm"):
        fmoe.patch(model, backend="tritn")


def test_L0_doge_has_no_experts_that_are_matrices() -> None:
    from transformers import DogeConfig, DogeForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    model = DogeForCausalLM(DogeConfig(**sizes, num_key_value_heads=2, is_moe=True, num_experts=16))
    with pytest.raises(ValueError, match="DogeCDMoE\\): its experts are rows of embeddings"):
        fmoe.patch(model)
    with pytest.raises(ValueError, match="DogeCDMoE\\) would not run through fmoe: its experts are rows"):
        model.set_experts_implementation("fmoe")
