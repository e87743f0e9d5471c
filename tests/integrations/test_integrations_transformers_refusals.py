"""L0, on the installed Transformers: what would compute something else is refused by name."""

import copy
import inspect
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from eager_parity import expert_modules, far
from torch import Tensor, nn

import fmoe
from fmoe.integrations import bindings, gates
from fmoe.integrations import transformers as integration

integration.register()


class Odd(nn.Module):
    def forward(self, g: Tensor) -> Tensor:
        return g + 1


def test_L0_an_unknown_gate_is_refused_by_class_and_function() -> None:
    model, inputs = zoo.build("mixtral")
    kind = type(expert_modules(model)[0])
    known, was = dict(gates.KNOWN), kind._apply_gate

    def softer(self: Any, u: Tensor) -> Tensor:
        g, v = u.chunk(2, -1)
        return torch.tanh(g) * v

    try:
        kind._apply_gate = softer
        for asked in (lambda: model.set_experts_implementation("fmoe"), lambda: fmoe.patch(model)):
            with pytest.raises(
                ValueError, match="MixtralExperts._apply_gate is .*softer: what it computes is not known"
            ):
                asked()
        assert model.config._experts_implementation == "eager"
        with pytest.raises(ValueError, match="is not known"):
            bindings.decorated(expert_modules(model)[0], torch.ones(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))
        gates.know(softer, "swiglu")
        with pytest.raises(ValueError, match="MixtralExperts: known as swiglu, its function gives other numbers"):
            fmoe.patch(model)
        gates.know(softer)
        model.set_experts_implementation("grouped_mm")  # which calls it, as fmoe now does
        expected = zoo.output(model, inputs)
        model.set_experts_implementation("fmoe")
        assert far(zoo.output(model, inputs), expected) <= 1e-5
    finally:
        kind._apply_gate = was
        gates.KNOWN.clear()
        gates.KNOWN.update(known)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("gpt_oss", dict(is_concatenated=True), "declares gate and up concatenated, but .* reads it interleaved"),
        ("mixtral", dict(is_concatenated=False), "declares gate and up interleaved, but .* reads it concatenated"),
        ("mixtral", dict(act_fn=Odd()), r"MixtralExperts.act_fn is .*Odd: what it computes is not known"),
    ],
)
def test_L0_flags_that_contradict_the_function_are_refused(name: str, change: dict[str, Any], told: str) -> None:
    model, _ = zoo.build(name)
    for key, value in change.items():
        setattr(expert_modules(model)[1], key, value)
    with pytest.raises(ValueError, match=told):
        fmoe.patch(model)
    assert not any(integration.runs_through_fmoe(m) for m in model.modules())


@pytest.mark.parametrize("name", zoo.UNDECORATED)
def test_L0_a_model_that_would_ignore_it_says_so(name: str) -> None:
    model, _ = zoo.build(name)
    before = model.get_experts_implementation()
    with pytest.raises(ValueError, match=r"would not run through fmoe: .*"):
        model.set_experts_implementation("fmoe")
    assert model.get_experts_implementation() == before
    config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=r"fmoe\.patch\(model\)"):
        type(model)._from_config(config, experts_implementation="fmoe")


def test_L0_a_dense_model_says_so() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        model.set_experts_implementation("fmoe")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts that fmoe can bind"):
        fmoe.patch(model)


def test_L0_names_and_backends() -> None:
    integration.register()
    integration.register("fmoe_loop", backend="loop")
    with pytest.raises(ValueError, match="'fmoe' is taken"):
        integration.register("fmoe", backend="loop")
    with pytest.raises(ValueError, match="'grouped_mm' is taken"):
        integration.register("grouped_mm")
    model, inputs = zoo.build("mixtral")
    expected = zoo.output(model, inputs)
    model.set_experts_implementation("fmoe_loop")
    assert far(zoo.output(model, inputs), expected) <= 1e-5
    seen = []

    def mine(params: Any, rows: Any, config: Any) -> Tensor:
        seen.append(config.expert_activation)
        return fmoe.experts.__globals__["find"]("loop", rows.x.device)(params, rows, config)

    report = fmoe.patch(model, backend=mine)
    assert far(zoo.output(model, inputs), expected) <= 1e-5 and seen == ["swiglu"] * 2
    report.undo()
    zoo.output(model, inputs)
    assert len(seen) == 2


def test_L2_properties_of_experts_that_are_not_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    known = inspect.signature(moe.use_experts_implementation).parameters
    assert {*bindings.FLAGS, "experts_class", "experts_interface"} == known.keys()

    def newer(experts_class: Any = None, *, experts_interface: Any = None, has_inner_norm: bool = False) -> None: ...

    monkeypatch.setattr(moe, "use_experts_implementation", newer)
    with pytest.raises(RuntimeError, match="marks experts with has_inner_norm, which this fmoe does not read"):
        integration.register("newer")
    assert "newer" not in moe.ALL_EXPERTS_FUNCTIONS


def test_L0_a_backend_without_room_for_a_function_says_so() -> None:
    model, inputs = zoo.build("muse_spark")
    fmoe.patch(model, backend="torch_mm_mxfp8")
    with pytest.raises(ValueError, match="'torch_mm_mxfp8'.*only loop, torch_mm, triton leave room"):
        zoo.output(model, inputs)


def test_L0_eight_bits_and_dtensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    with pytest.raises(NotImplementedError, match="weights in 8 bits"):
        ALL_FP8_EXPERTS_FUNCTIONS.get_interface("fmoe", None)(nn.Module())
    module = expert_modules(zoo.build("mixtral")[0])[0]
    module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="MixtralExperts.down_proj is torch.float8_e4m3fn, expected it decoded"):
        bindings.views(module)
    monkeypatch.setattr(bindings, "is_dtensor", lambda t: True)
    with pytest.raises(ValueError, match="MixtralExperts.gate_up_proj is a DTensor, expected this rank's part"):
        bindings.views(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # the tracer's own
def test_a_patched_model_under_the_tracer_of_torchscript_is_refused() -> None:
    model, _ = zoo.build("mixtral")
    fmoe.patch(model)
    with torch.no_grad(), pytest.raises(ValueError, match=r"under torch\.jit\.trace"):
        torch.jit.trace(model.model.layers[0].mlp, (torch.randn(1, 3, 32),))
