"""What PEFT's target_modules and target_parameters reach besides experts: read with its meaning, or refused by name."""

import json
import re
from typing import Any

import peft
import pytest
import torch
from peft_cases import ALONE, ALPHA, MODELS, WARNS, R, adapter_of, build, close, parameters, wraps
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.testing import same

pytestmark = WARNS
MIXED = ["qwen3_moe", "jamba", "dots3_note", "bailing_hybrid", "qwen3_vl_moe"]  # layers, and towers, of several kinds
ADDS = {"minimax", "minimax_m2", "mixtral"}  # PEFT's config names parameters here that a regular expression leaves out


def wrapped(name: str, **how: Any) -> Any:
    """PEFT's model with random matrices, and its weights and adapter before."""
    model = build(name)
    adapter = adapter_of(model)
    before = adapter.from_hf({n: t.clone() for n, t in model.state_dict().items()})
    made = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, **how))
    drawn = torch.Generator().manual_seed(1)
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=drawn))
    return made, before, adapter


def has_pefts_meaning(path: Any, made: Any, before: dict[str, Any], adapter: fmoe.Adapter, base: Any = None) -> None:
    made.save_pretrained(path)
    files = load_file(path / "adapter_model.safetensors")
    tuned = fmoe.lora.load(path, base or adapter)
    same(tuned.adapter.to_hf(tuned.params), files)
    fmoe.lora.save(tuned.params, path / "again", tuned.adapter, tuned.config)
    same(load_file(path / "again" / "adapter_model.safetensors"), files)
    ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
    theirs = adapter.from_hf(made.merge_and_unload().state_dict())
    assert any(not torch.equal(before[n], t) for n, t in theirs.items())
    for n, t in theirs.items():
        close(ours[n].float(), t.float(), 1e-6)


ROUTERS = {"qwen3_moe": "mlp.gate.weight", "gpt_oss": "mlp.router.weight", "jamba": "feed_forward.router.weight"}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_a_parameter_of_two_dimensions(name, tmp_path):
    """Its rank and alpha are of the parameter's name."""
    how = dict(rank_pattern={ROUTERS[name]: 2}, alpha_pattern={ROUTERS[name]: 1.5})
    made, before, adapter = wrapped(name, target_modules=[], target_parameters=[ROUTERS[name]], **how)
    has_pefts_meaning(tmp_path, made, before, adapter)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_no_stack_whose_rank_may_be_a_multiple(name, tmp_path):
    """Refused by merge, and so by load and save: of a base by its adapter, and by its directory."""
    build(name).save_pretrained(tmp_path / "base")
    made, before, adapter = wrapped(name, target_modules=[], target_parameters=[ROUTERS[name]])
    made.save_pretrained(tmp_path / "a")
    tuned = fmoe.lora.load(tmp_path / "a", adapter)
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"r": 1}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    says = f"has rank {R}, and adapter_config.json says .1. of .*{ROUTERS[name]}"
    for base in adapter, tmp_path / "base":
        with pytest.raises(fmoe.AdapterError, match=says):
            fmoe.lora.load(tmp_path / "a", base)
    with pytest.raises(fmoe.AdapterError, match=says):
        fmoe.lora.save(tuned.params, tmp_path / "b", tuned.adapter, fmoe.lora.LoraConfig.read(said))
    scales = tuned._replace(config=fmoe.lora.LoraConfig.read(said)).scales
    with pytest.raises(fmoe.AdapterError, match="do not fit"):
        fmoe.lora.merge(before, tuned.params, scales)


@pytest.mark.parametrize("name", [*MIXED, *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS
                                               if n not in (*ALONE, *MIXED, *ADDS))])  # fmt: skip
@pytest.mark.parametrize("from_directory", [False, True])
def test_all_linear_layers(from_directory, name, tmp_path):
    """Of a base by its adapter alone, and by its directory, whose names are those that it is published under."""
    linear = [n for n in wraps(build(name)) if re.fullmatch(r"(?!.*gate_up).*(proj|linear\w*|dense)", n)]
    made, before, adapter = wrapped(name, target_modules="|".join(map(re.escape, linear)))
    if from_directory:
        build(name).save_pretrained(tmp_path / "base")
    has_pefts_meaning(tmp_path, made, before, adapter, tmp_path / "base" if from_directory else None)


BESIDE = {"hy_v3": r".*", "aria": r".*(vision_tower|projector).*", "qwen3_omni_moe_thinker": r".*(audio|visual).*"}


@pytest.mark.parametrize("name", BESIDE)
def test_modules_beside_experts_and_of_towers_by_the_published_directory(name, tmp_path):
    """A module has the last name of an expert's parameter; towers have other names in memory, and convolutions."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)  # PEFT adapts these
    linear = [n for n, m in model.named_modules() if isinstance(m, kinds) and n != "lm_head"]
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    ends = sorted({n.rpartition(".")[2] for n in linear if re.fullmatch(BESIDE[name], n)} - {"0", "2"})
    made, _, _ = wrapped(name, target_modules=ends, target_parameters=experts if name == "hy_v3" else [])
    made.save_pretrained(tmp_path / "a")
    tuned, before = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs = fmoe.load(tmp_path / "merged")
    assert sum(not torch.equal(before[n], t) for n, t in theirs.items()) == len(tuned.scales) >= len(ends)
    for n, t in theirs.items():
        close(ours[n], t, 1e-6)
    if name == "hy_v3":  # of a tower that a config does not say to be there, it is not known
        lost = next(n for n in load_file(tmp_path / "a" / "adapter_model.safetensors") if f".{ends[0]}.lora_A" in n)
        changed(tmp_path / "a", lost.partition(".lora_")[0] + ".lora_")
        with pytest.raises(fmoe.AdapterError, match=f"{ends[0]}.*no matrices"):
            fmoe.lora.load(tmp_path / "a", tmp_path / "base")


def changed(path: Any, drop: str = "", **said: Any) -> Any:
    """The directory without the tensors whose names have a part, and another config."""
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if not drop or drop not in n}, path / "adapter_model.safetensors")
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    return path


def test_a_lost_layer_is_missed_also_where_memory_has_other_names(tmp_path):
    made, _, adapter = wrapped("bailing_hybrid", target_modules=["q_proj", "down_proj"])
    build("bailing_hybrid").save_pretrained(tmp_path / "base")
    made.save_pretrained(tmp_path / "a")
    fmoe.lora.load(tmp_path / "a", tmp_path / "base")
    layer = next(n for n in load_file(tmp_path / "a" / "adapter_model.safetensors") if ".q_proj." in n)
    changed(tmp_path / "a", layer.partition(".lora_")[0])
    with pytest.raises(fmoe.AdapterError, match="q_proj.*no matrices"):
        fmoe.lora.load(tmp_path / "a", tmp_path / "base")


def test_layers_that_exclude_modules_leaves_out_are_no_gap(tmp_path):
    made, before, adapter = wrapped("qwen3_moe", target_modules=["q_proj"], exclude_modules=r".*layers\.0\..*")
    has_pefts_meaning(tmp_path, made, before, adapter)
    with pytest.raises(fmoe.AdapterError, match=r"layers\.0\.self_attn\.q_proj.*no matrices"):
        fmoe.lora.load(changed(tmp_path, exclude_modules=None), adapter)


def test_several_parameters_of_one_module_are_refused_by_name(tmp_path):
    """Around which each of the wrappers is, no name says."""
    both = ["shared_experts.gate_proj", "shared_experts.up_proj"]
    made, _, adapter = wrapped("inkling_text", target_modules=[], target_parameters=both)
    made.save_pretrained(tmp_path / "a")
    build("inkling_text").save_pretrained(tmp_path / "base")
    for base in (adapter, tmp_path / "base"):
        with pytest.raises(fmoe.AdapterError, match="shared_experts': LoRA of 'up_proj', one of .*Fix: merge it"):
            fmoe.lora.load(tmp_path / "a", base)


def test_a_parameter_without_its_module_is_refused_with_a_fix_that_works(tmp_path):
    made, before, adapter = wrapped("jamba", target_modules=[], target_parameters=["A_log"])
    made.save_pretrained(tmp_path / "a")
    build("jamba").save_pretrained(tmp_path / "base")
    for base in (adapter, tmp_path / "base"):
        with pytest.raises(fmoe.AdapterError, match="targets 'A_log'.*Fix: write it with its module"):
            fmoe.lora.load(tmp_path / "a", base)
    tuned = fmoe.lora.load(changed(tmp_path / "a", target_parameters=["mamba.A_log"]), adapter)
    ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
    for n, t in adapter.from_hf(made.merge_and_unload().state_dict()).items():
        close(ours[n], t, 1e-6)


@pytest.mark.parametrize("name", ["dots3_note", *MIXED])
def test_a_rank_of_other_modules_says_nothing_of_experts(name, tmp_path):
    """Also where nothing but r tells how many experts a stack's matrices are of, as in a tower."""
    targets = [t for t in parameters(adapter_of(build(name))) if "gate_up" in t]
    how = dict(target_modules=["k_proj"], rank_pattern={"k_proj": 5})
    made, before, adapter = wrapped(name, target_parameters=targets, **how)
    has_pefts_meaning(tmp_path, made, before, adapter)
