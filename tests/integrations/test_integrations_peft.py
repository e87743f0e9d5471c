"""L0, on the installed PEFT: LoRA on expert parameters trains as PEFT's own on eager, and nothing is made."""

import copy
import warnings
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from eager_parity import Calls, far
from torch import Tensor
from wrapped_zoo import GATED, bound, draw, grads, same, wrapped

import fmoe
from fmoe.integrations import transformers as integration

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora.layer import ParamWrapper

integration.register()
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
