"""L0, on the installed PEFT: LoRA on expert parameters runs as the LoRA of `fmoe.experts`, with PEFT's own numbers."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from test_integrations_transformers import Calls, calls, expert_modules, far  # noqa: F401
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

import fmoe
from fmoe.integrations import bindings, peft
from fmoe.integrations import transformers as integration

integration.register()
GATED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS: dict[str, list[str]] = {
    "qwen3_moe": GATED,
    "gpt_oss": GATED,
    "nemotron_h": ["mixer.experts.up_proj", "mixer.experts.down_proj"],
    "granitemoe": ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"],
    "muse_spark": GATED,
    "inkling2": GATED,
    "longcat_flash": GATED,
    "step3p7": GATED,
    "llama4_text": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
}
ALONE = {"down alone": GATED[1:], "up alone": GATED[:1]}


def bound(model: nn.Module, name: str) -> nn.Module:
    """By the registry where Transformers has one, and otherwise by hand."""
    fmoe.patch(model) if name in zoo.UNDECORATED else model.set_experts_implementation("fmoe")
    return model


def wrapped(model: Any, targets: list[str], seed: int = 0, **how: Any) -> Any:
    """The model in PEFT's hands, with B drawn too: zeros would hide everything."""
    options: dict[str, Any] = dict(r=3, lora_alpha=5, target_modules=[]) | how
    config = LoraConfig(target_parameters=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config)
    draw(made, seed)
    return made


def draw(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p) * 0.1


def grads(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    y = zoo.output(model, inputs)
    r = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * r).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert far(found[0], expected[0]) <= tolerance
    assert found[1].keys() == expected[1].keys() and any("lora_" in name for name in found[1])
    for name, g in expected[1].items():
        assert g.any() and far(found[1][name], g) <= tolerance, name


@pytest.fixture
def deltas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters that PEFT has replaced by W + BA, for a forward or for good."""
    made: list[str] = []
    parametrize, merge = nn.utils.parametrize.register_parametrization, ParamWrapper.get_delta_weight

    def replaced(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> nn.Module:
        made.append(name)
        return parametrize(module, name, *args, **kwargs)

    def added(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        made.append(self.parameter_name)
        return merge(self, *args, **kwargs)

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", replaced)
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", added)
    return made


CASES = [(name, targets) for name, targets in TARGETS.items()] + [("qwen3_moe", t) for t in ALONE.values()]


@pytest.mark.parametrize(("name", "targets"), CASES, ids=[n for n in TARGETS] + list(ALONE))
def test_L0_lora_trains_as_peft_on_eager_and_nothing_is_made(
    name: str,
    targets: list[str],
    calls: Calls,  # noqa: F811
    deltas: list[str],
) -> None:
    eager, inputs = zoo.build(name)
    dtype = torch.float32 if name == "inkling2" else torch.float64
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5 if name in ("muse_spark", "nemotron_h") else 1e-10}[dtype]
    theirs = wrapped(eager.to(dtype), targets)
    expected = grads(theirs, inputs)
    assert deltas
    deltas.clear()
    mine = wrapped(bound(zoo.build(name)[0].to(dtype), name), targets)
    calls.params.clear()
    found = grads(mine, inputs)
    assert not deltas and calls.params
    parts = {"gate_and_up" if "up_proj" in t else "down" for t in targets}
    held = {p.untyped_storage().data_ptr() for n, p in mine.named_parameters() if "lora_" not in n}
    for params in calls.params:
        assert {params[n].untyped_storage().data_ptr() for n in ("gate_and_up_projs", "down_projs")} <= held
        assert {n for n in params if n.startswith("lora_")} == {f"lora_{part}_{ab}" for part in parts for ab in "AB"}
    same(found, expected, tolerance)
    assert not any("_fmoe_lora" in m.__dict__ and m.__dict__["_fmoe_lora"] for m in mine.modules())


def test_L0_patched_after_peft_and_back(deltas: list[str]) -> None:
    model, inputs = zoo.build("mixtral")
    model = wrapped(model.double(), GATED)
    expected = grads(model, inputs)
    report = fmoe.patch(model)
    assert all("experts" in b.name for b in report.bound) and len(report.bound) == 2
    deltas.clear()
    same(grads(model, inputs), expected, 1e-10)
    assert not deltas
    report.undo()
    same(grads(model, inputs), expected, 0.0)
    assert deltas


@pytest.mark.parametrize("how", [dict(use_rslora=True), dict(rank_pattern={"down_proj": 5}, alpha_pattern={"down": 2})])
def test_L0_scaling_and_ranks_are_pefts(how: dict[str, Any], deltas: list[str]) -> None:
    expected = grads(wrapped(zoo.build("gpt_oss")[0].double(), GATED, **how), zoo.build("gpt_oss")[1])
    deltas.clear()
    model = wrapped(bound(zoo.build("gpt_oss")[0].double(), "gpt_oss"), GATED, **how)
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert len({(m.r["default"], m.scaling["default"]) for m in wrappers}) == (2 if "rank_pattern" in how else 1)
    same(grads(model, zoo.build("gpt_oss")[1]), expected, 1e-10)
    assert not deltas


def test_L0_two_adapters_at_once_one_alone_and_none(deltas: list[str]) -> None:
    outputs: list[list[Tensor]] = []
    for run in (lambda model: model, lambda model: bound(model, "mixtral")):
        model, inputs = zoo.build("mixtral")
        model = wrapped(run(model.double()), GATED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter("second", LoraConfig(r=2, lora_alpha=7, target_modules=[], target_parameters=GATED))
        draw(model, 4)
        deltas.clear()
        made = []
        for active in (["default", "second"], ["second"], ["default"]):
            model.base_model.set_adapter(active)
            made.append(zoo.output(model, inputs).detach())
        with model.disable_adapter():
            made.append(zoo.output(model, inputs).detach())
        outputs.append(made)
    assert not deltas
    for found, expected in zip(*outputs[::-1], strict=True):
        assert far(found, expected) <= 1e-10
    assert len({float(y.sum()) for y in outputs[0]}) == 4


def test_L0_merged_saved_and_loaded_by_peft(tmp_path: Any, deltas: list[str]) -> None:
    model, inputs = zoo.build("qwen3_moe")
    base = copy.deepcopy(model)
    model = wrapped(bound(model, "qwen3_moe"), GATED)
    expected = zoo.output(model, inputs).detach()
    model.save_pretrained(tmp_path)
    assert not deltas
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(bound(base, "qwen3_moe"), tmp_path)
    assert far(zoo.output(again, inputs), expected) <= 1e-6 and not deltas
    merged = model.merge_and_unload()
    assert deltas and far(zoo.output(merged, inputs), expected) <= 1e-5


def test_L0_checkpointing_and_frozen_weights(deltas: list[str]) -> None:
    model, inputs = zoo.build("mixtral")
    model = wrapped(bound(model.double(), "mixtral"), GATED)
    expected = grads(model, inputs)
    model.train()
    model.activation_checkpointing_enable()
    same(grads(model, inputs), expected, 1e-12)
    assert not deltas and all("lora_" in name for name in expected[1])


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_L0_factors_are_what_peft_adds_whichever_way_it_packs(swapped: bool, transposed: bool) -> None:
    """PEFT before 0.20 packed features the other way round; what it adds to a parameter says what A and B are."""
    model, _ = zoo.build("mixtral")
    wrapper: Any = next(m for m in wrapped(model, GATED).modules() if isinstance(m, ParamWrapper))
    E, r, (a, b) = wrapper.num_experts, 3, (5, 7)
    shape = {True: (b, a), False: (a, b)}[swapped]  # of one expert of the parameter
    wrapper.lora_A["default"] = nn.Linear(a, r * E, bias=False)
    wrapper.lora_B["default"] = nn.Linear(r * E, b, bias=False)
    wrapper._did_swap_in_out_features = swapped
    delta = wrapper.get_delta_weight("default")
    assert delta.shape == (E, *shape)
    A, B = peft.factors(wrapper, ["default"], transposed)
    assert far(A @ B, delta if transposed else delta.mT) <= 1e-6


def test_L0_what_is_not_ours_stays_pefts(deltas: list[str]) -> None:
    """A bias, the parameters of an eager model, and wrappers around modules inside a bound one."""
    targets = ["mlp.experts.gate_up_proj_bias", *GATED]
    model, inputs = zoo.build("gpt_oss")
    expected = grads(wrapped(model.double(), targets), inputs)
    deltas.clear()
    same(grads(wrapped(bound(zoo.build("gpt_oss")[0].double(), "gpt_oss"), targets), inputs), expected, 1e-10)
    assert set(deltas) == {"gate_up_proj_bias"}
    for name, target in (("jetmoe", "input_linear.weight"), ("dbrx", "mlp.w1")):
        model, inputs = zoo.build(name)
        fmoe.patch(model)
        model = wrapped(model, [target])
        with pytest.raises(RuntimeError, match="runs in fmoe on parameters of '.*', a peft.*ParamWrapper, exp"):
            zoo.output(model, inputs)
    model, inputs = zoo.build("switch_transformers")
    fmoe.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(target_modules=["wi"]))
    with pytest.raises(RuntimeError, match="'wi', a peft.tuners.lora.layer.Linear, expected torch.nn.modules.lin"):
        zoo.output(model, inputs)


def test_L0_peft_imported_before_or_after_is_told() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "import fmoe; fmoe.integrations.transformers.register(); fmoe.integrations.transformers.register()\n"
        "assert 'peft' not in sys.modules\n"
        "from peft.tuners.lora.layer import ParamWrapper\n"
        "assert hasattr(ParamWrapper._activate_lora, '_fmoe')\n"
        "fmoe.integrations.transformers.register()\n"
        "assert not hasattr(ParamWrapper._activate_lora._fmoe, '_fmoe')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_L0_a_peft_that_wraps_otherwise_is_refused() -> None:
    class Layer:
        __name__ = "peft.tuners.lora.layer"

    with pytest.raises(RuntimeError, match="has no ParamWrapper._activate_lora"):
        peft.teach(Layer(), integration.runs_through_fmoe)


assert bindings and expert_modules
