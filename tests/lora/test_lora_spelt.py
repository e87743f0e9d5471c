"""Modules that published files call otherwise than memory, within layers and towers: merged into the same tensors."""

from typing import Any

import known_spelt
import peft
import pytest
import torch
from peft_cases import ALPHA, MODELS, WARNS, R, build, close
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.families.spelling import alike, spelt

pytestmark = WARNS
DIFFER = [n for n in MODELS if spelt().get(n)]
KINDS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)  # PEFT adapts these
SOME = ["deepseek_v4", "aria", "minimax_m3_vl", "step3p7"]


def starred(name: str) -> set[str]:
    parts = name.split(".")
    return {name, *(".".join((*parts[:i], "*", *parts[i + 1 :])) for i, p in enumerate(parts) if p.isdigit())}


def cut(name: str, module: str) -> bool:
    """Whether its weight is no tensor of its own in files."""
    return any(spelt()[name].get(n) == [] for n in starred(module))


def wrapped(name: str, path: Any, wanted: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """PEFT's model of these modules, in directories of its base (`base`) and alone (`a`); tensors in memory, before."""
    model = build(name).double()
    model.save_pretrained(path / "base")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    taken = lambda n: n != "lm_head" and not (name == "nemotron_h" and n.endswith("out_proj"))  # by PEFT
    ends = [n for n, m in model.named_modules() if isinstance(m, KINDS) and taken(n) and wanted(n)]
    made = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=ends)).double()
    drawn = torch.Generator().manual_seed(1)
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=drawn))
    made.save_pretrained(path / "a")
    return made, before, {n: t for n, t in load_file(path / "a" / "adapter_model.safetensors").items()}


ALL = pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in DIFFER])


@ALL
def test_every_module_is_merged_into_its_tensor_of_the_published_directory(name, tmp_path):
    made, _, files = wrapped(name, tmp_path, lambda n: not cut(name, n))
    tuned, before = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = fmoe.load(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    assert sum(not torch.equal(before[n], t) for n, t in theirs.items()) == len(files) // 2
    for n, t in theirs.items():
        close(ours[n], t, 1e-12)


@ALL
def test_a_module_lost_is_missed_whatever_it_is_called(name, tmp_path):
    """The last of every kind that several layers have, of the text model and of towers."""
    _, _, files = wrapped(name, tmp_path, lambda n: not cut(name, n))
    modules = [n.partition(".lora_")[0] for n in files if ".lora_A" in n]
    kinds = {min(starred(m), key=lambda n: ("*" not in n, len(n))): m for m in modules}
    for lost in kinds.values():
        if sum(bool(starred(m) & starred(lost) - {m}) for m in modules) > 1:
            rest = {n: t for n, t in files.items() if not n.startswith(f"{lost}.lora_")}
            save_file(rest, tmp_path / "a" / "adapter_model.safetensors")
            with pytest.raises(fmoe.AdapterError, match="no matri|one wrapper, and target_parameters"):
                fmoe.lora.load(tmp_path / "a", tmp_path / "base")


ELSE = "bailing_hybrid ernie4_5_vl_moe glm5_next glm5_next_text inkling2 inkling2_loop inkling2_loop_text inkling2_text"
NO_MODULES = {*ELSE.split(), "kimi_linear"}
"""What of these files fuse or cut is convolutions of one dimension, routers, stacks and heads."""


@pytest.mark.parametrize("name", [n for n in DIFFER if [] in spelt()[n].values()])
def test_what_files_fuse_or_cut_is_refused_with_fixes_that_work(name, tmp_path):
    if name in NO_MODULES:
        found = [n for n, m in build(name).named_modules() if isinstance(m, KINDS) and cut(name, n)]
        assert {*found} <= {"lm_head"}
        return
    made, memory, _ = wrapped(name, tmp_path, lambda n: cut(name, n))
    tuned = fmoe.lora.load(tmp_path / "a", tmp_path / "base")
    if name != "minimax_m3_vl":  # a rule of its adapter knows how files have it
        fix = "expected it among params. Fix.*state_dict.*merge_and_unload"
        with pytest.raises(fmoe.AdapterError, match=fix) as error:
            fmoe.lora.merge(fmoe.load(tmp_path / "base"), tuned.params, tuned.scales)
        assert error.value.keys and {*error.value.keys} <= tuned.params.keys()
    adapter = fmoe.adapter(made.config.model_type, made.config)
    ours = fmoe.lora.merge(adapter.from_hf(memory), tuned.params, tuned.scales)
    theirs = adapter.from_hf(made.merge_and_unload().state_dict())
    for n, t in theirs.items():
        close(ours[n], t, 1e-12)


@ALL
def test_the_data_is_what_transformers_writes(name):
    for module, others in known_spelt.spelt(name, None).items():
        assert spelt()[name][module] == others


def test_a_name_and_its_others_are_one_class():
    for name, modules in spelt().items():
        for ours, others in ((n, of) for n, of in modules.items() if n):
            for n in (ours, *others):
                at = n.replace("*", "5") + ".weight"
                assert not others or alike({"model_type": name}, at)[-1] == ours.replace("*", "5") + ".weight"
