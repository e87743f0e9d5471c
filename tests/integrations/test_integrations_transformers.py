"""L0, on the installed Transformers: every class of experts that it has runs through fmoe and gives eager's numbers."""

import copy
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from eager_parity import Calls, expert_modules, far
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fmoe
from fmoe.integrations import bindings, stacks
from fmoe.integrations import transformers as integration

integration.register()
LOOSE = {  # eager, or the model around the experts, computes in fp32 whatever the dtype
    "beam", "muse_spark", "nemotron_h", "nemotron_h_latent", "openai_privacy_filter",
}  # fmt: skip
SINGLE = {"inkling2", "inkling2_loop"}  # their routers do not run in fp64


def step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    """The output, the gradients of a loss, and the output after one step of SGD."""
    model.zero_grad(set_to_none=True)
    y = zoo.output(model, inputs)
    r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * r).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0 if p.grad is None else p.grad * (1e-2 / largest)
        after = zoo.output(model, inputs)
    return y.detach(), grads, after


def as_written() -> Any:
    """Transformers compiles parts of some models, which takes half a minute: run those as they are written."""
    return torch.compiler.set_stance("force_eager")


def same_step(found: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float) -> None:
    """Outputs, and every gradient: relative to itself, or where it is nothing but noise, to the largest."""
    assert far(found[0], expected[0]) <= tolerance and far(found[2], expected[2]) <= tolerance
    total = max(float(g.norm()) for g in expected[1].values() if g is not None)
    for name, g in expected[1].items():
        mine = found[1][name]
        if g is None or mine is None:  # of experts that no token of the batch went to: eager may leave none
            assert g is mine or not any(t.any() for t in (g, mine) if t is not None), name
        else:
            assert float((mine - g).norm()) <= tolerance * max(float(g.norm()), 1e-6 * total), name


@pytest.mark.parametrize("name", zoo.DECORATED)
def test_L0_forward_gradients_and_a_training_step_are_those_of_eager(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    layers = expert_modules(model)
    assert layers
    with torch.no_grad(), as_written():
        expected = zoo.output(model, inputs)
        assert not calls.params
        model.set_experts_implementation("fmoe")
        assert far(zoo.output(model, inputs), expected) <= 1e-5
    assert calls.params and all(integration.runs_through_fmoe(m) for m in layers)
    dtype = torch.float32 if name in SINGLE else torch.float64
    model = model.to(dtype)
    inputs = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    before = copy.deepcopy(model.state_dict())
    with as_written():
        found = step(model, inputs)
    model.load_state_dict(before)
    model.set_experts_implementation("eager")
    n = len(calls.params)
    with as_written():
        expected = step(model, inputs)
    assert len(calls.params) == n
    same_step(found, expected, 1e-5 if name in SINGLE | LOOSE else 1e-10)


@pytest.mark.parametrize("name", zoo.DECORATED)
def test_L0_a_layer_of_experts_and_all_its_gradients_are_eagers_in_fp32(name: str) -> None:
    """Of the layer alone: some models around it magnify a last bit to more than 1e-5, whoever multiplies."""
    module: Any = expert_modules(zoo.build(name)[0])[0]
    D, E = bindings.views(module)["gate_and_up_projs"].shape[1], module.num_experts
    made = torch.Generator().manual_seed(0)
    x, weights = torch.randn(40, D, generator=made), torch.rand(40, 2, generator=made)
    index = torch.rand(40, E - 1, generator=made).argsort(-1)[:, :2]  # nobody goes to the last
    results = []
    for run in ("fmoe", "eager"):
        module.config._experts_implementation_internal = run
        module.zero_grad()
        a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(a, index, w)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        results.append({"y": y, "x": a.grad, "w": w.grad} | {n: p.grad for n, p in module.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for key, expected in results[1].items():
        assert far(results[0][key], expected) <= 1e-5, key


@pytest.mark.parametrize("name", zoo.UNDECORATED)
def test_L0_patched_forward_gradients_and_a_training_step_are_those_of_eager(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    expected = zoo.output(model, inputs)
    report = fmoe.patch(model)
    assert far(zoo.output(model, inputs), expected) <= 1e-5
    assert len(calls.params) >= 1
    model = model.double()
    before = copy.deepcopy(model.state_dict())
    found = step(model, inputs)
    model.load_state_dict(before)
    report.undo()
    n = len(calls.params)
    expected_step = step(model, inputs)
    assert len(calls.params) == n
    same_step(found, expected_step, 1e-10)


def test_L0_every_decorated_class_of_this_transformers_is_in_the_table() -> None:
    found = {type(m).__name__ for name in zoo.DECORATED for m in expert_modules(zoo.build(name)[0])}
    assert found == zoo.classes().keys() and len(found) >= 60


GENERATING = [name for name in zoo.NAMES if zoo.arch(name).endswith(("ForCausalLM", "ForConditionalGeneration"))]
GENERATING.remove("qwen3_omni_moe_thinker")  # does not generate from text alone, whoever multiplies


@pytest.mark.parametrize("name", GENERATING)
def test_L0_generation_is_that_of_eager(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    ids = inputs["input_ids"][:, :6]
    how: dict[str, Any] = dict(
        max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(ids), use_cache=True,
    )  # fmt: skip
    if model.config.is_encoder_decoder:
        how["decoder_start_token_id"] = 0
    with as_written():
        expected = model.generate(ids, **how)
        fmoe.patch(model)
        found = model.generate(ids, **how)
    assert torch.equal(found.sequences, expected.sequences) and calls.params
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        assert far(mine, theirs) <= 1e-5


@pytest.mark.parametrize("name", [*zoo.DECORATED, "llama4_text", "longcat_flash", "step3p7", "jetmoe", "dbrx"])
def test_L0_parameters_are_views_and_never_copies(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    fmoe.patch(model)
    with torch.no_grad(), as_written():
        zoo.output(model, inputs)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert calls.params
    for params in calls.params:
        assert {t.untyped_storage().data_ptr() for t in params.values()} <= mine


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
def test_L0_experts_that_are_modules_are_stacked_without_a_copy(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    fmoe.patch(model)
    assert all(torch.equal(p, values[n]) and id(p) == ids[n] for n, p in model.named_parameters())
    with torch.no_grad():
        zoo.output(model, inputs)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {t.untyped_storage().data_ptr() for params in calls.params for t in params.values()} <= mine
    model.to(torch.float64)  # no longer side by side: copied for each call, and right
    model.to(torch.float32)
    expected = zoo.output(model, inputs)
    assert far(zoo.output(zoo.build(name)[0], inputs), expected) <= 1e-5
    model, eager = zoo.build(name)[0].double(), zoo.build(name)[0].double()
    fmoe.patch(model)
    same_step(step(model, inputs), step(eager, inputs), 1e-10)  # gradients through the view


def test_L0_stacks_are_right_however_parameters_lie() -> None:
    whole = torch.arange(24.0)
    even, uneven = [whole[i : i + 2] for i in (0, 5, 10)], [whole[i : i + 2] for i in (0, 5, 12)]
    backwards = even[::-1]
    for parts in (even, uneven, backwards, even[:1], [p.clone() for p in even]):
        assert torch.equal(stacks.stacked(parts), torch.stack(parts))
    assert stacks.stacked(even).data_ptr() == whole.data_ptr()
    leaves = [nn.Parameter(p.clone()) for p in uneven]
    stacks.gather(leaves)
    (stacks.stacked(leaves) * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert [p.grad.tolist() for p in leaves] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_L0_saved_and_loaded_by_name(name: str, tmp_path: Any, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    expected = zoo.output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="fmoe", dtype=torch.float32)
    assert far(zoo.output(loaded, inputs), expected) <= 1e-5 and calls.params
    if "CausalLM" in type(model).__name__:
        auto = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation={"": "fmoe"}, dtype=torch.float32)
        assert all(integration.runs_through_fmoe(m) for m in expert_modules(auto))
