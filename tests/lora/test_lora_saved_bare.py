"""LoRA saved without a config: what it adapts, a module or a parameter, is told by the base's class, or asked for.

Of all that PEFT wraps in any model, and the directory loaded by PEFT again, merged to the same weights in fp64.
"""

import json
from pathlib import Path

import known_adapted
import peft
import pytest
import torch
from peft_cases import ALPHA, MODELS, REFUSED, WARNS, R, adapter_of, build, parameters
from safetensors.torch import load_file
from test_lora_parameters import kinds, wrapped

import fmoe
from fmoe.families.spelling import adapted, held, stars
from fmoe.testing import same

pytestmark = [  # of three families PEFT finds nothing in its own directory
    *WARNS,
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]
SOME = ["qwen3_5_moe", "gpt_oss", "jamba", "deepseek_v4", "jetmoe", "ernie4_5_moe", "deepseek_ocr2"]
ALL = pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
KIMI = ("kimi_k25", {"text_config": {"num_hidden_layers": 1}})


def again(path: Path, name: str) -> fmoe.lora.LoraConfig:
    """What is saved of PEFT's directory without its config; PEFT reads it as it reads its own."""
    tuned = fmoe.lora.load(path / "a", path / "base")
    config = fmoe.lora.save(tuned.params, path / "again", fmoe.adapter(path / "base"), lora_alpha=ALPHA)
    same(*(load_file(path / at / "adapter_model.safetensors") for at in ("a", "again")))
    read = lambda at: peft.PeftModel.from_pretrained(build(name).double(), path / at).merge_and_unload().state_dict()
    ours, theirs = read("again"), read("a")
    for n, t in theirs.items():
        torch.testing.assert_close(ours[n], t, rtol=0, atol=1e-10)
    return config


@ALL
def test_parameters_are_saved_as_parameters_or_refused_by_name(name, tmp_path):
    dims = {n: p.ndim for n, p in build(name).named_parameters()}
    for i, (kind, targets) in enumerate(kinds(name).items()):
        try:
            wrapped(name, targets, tmp_path / str(i))
        except ValueError as error:
            assert "incompatible with Mamba" in str(error)
            continue
        module = kind.rpartition(".")[0]
        twins = [k for k in kinds(name) if k.rpartition(".")[0] == module]
        if dims[targets[0]] == 2 and len(twins) == 1:
            assert {*again(tmp_path / str(i), name).target_parameters} == {*targets}
        else:
            found = "it can adapt" if len(twins) > 1 else "it adapts a stack"
            with pytest.raises(fmoe.AdapterError, match=rf"lora_A.weight': {found}.*Fix: pass config="):
                again(tmp_path / str(i), name)


@ALL
def test_modules_are_saved_as_modules(name, tmp_path):
    """One of each linear module, and of each convolution that PEFT merges; words of experts are experts to PEFT."""
    model = build(name).double()
    model.save_pretrained(tmp_path / "base")
    fits = lambda m: isinstance(m, torch.nn.Linear) or isinstance(m, torch.nn.Conv1d) and m.groups == 1
    linear = {stars(n): n for n, m in model.named_modules() if fits(m)}
    apart = ("lm_head", "gate_proj", "up_proj", "down_proj", REFUSED.get(model.config.model_type))
    targets = [n for n in linear.values() if n.rpartition(".")[2] not in apart and ".experts." not in n]
    made = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets))
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    made.save_pretrained(tmp_path / "a")
    config = again(tmp_path, name)
    assert config.target_modules and not config.target_parameters


@ALL
def test_the_data_is_what_transformers_has(name):
    model = build(name)
    found = known_adapted.held(model, tuple(parameters(adapter_of(model))))
    assert found.items() <= held()[model.config.model_type].items()


def test_of_classes_that_nobody_knows_a_name_that_is_always_linear_is_a_module():
    """What the name of a module says is right in every class that is known."""
    for name, modules in held().items():
        for module, found in modules.items():
            assert adapted({}, module) is None or found == {}, f"{name}: {module}"


@pytest.mark.parametrize("stem", ["language_model.model", "model"])
def test_where_nobody_knows_it_a_config_is_asked_for_and_taken(stem, tmp_path):
    adapter = fmoe.adapter(*KIMI)
    pair = lambda n: {f"{n}.lora_A.weight": torch.ones(2, 8), f"{n}.lora_B.weight": torch.ones(4, 2)}
    linear, router = (f"{stem}.layers.0.{n}" for n in ("self_attn.q_a_proj", "mlp.gate"))
    assert fmoe.lora.save(pair(linear), tmp_path / "linear", adapter).target_modules == (linear,)
    with pytest.raises(fmoe.AdapterError, match="mlp.gate.lora_A.weight': whether PEFT adapts.*Fix: pass config="):
        fmoe.lora.save(pair(router), tmp_path / "router", adapter)
    assert not (tmp_path / "router").exists()
    for named in (dict(target_modules=[router]), dict(target_parameters=[f"{router}.weight"])):
        said = fmoe.lora.LoraConfig(r=2, lora_alpha=4, **named)
        fmoe.lora.save(pair(router), tmp_path / "router", adapter, said, force=True)
        written = json.loads((tmp_path / "router" / "adapter_config.json").read_text())
        assert {n: written[n] for n in named} == named


def test_what_load_was_told_counts(tmp_path):
    """An adapter that load gave knows its parameters; of a stack it does not know the rank."""
    for name, ends, stack in (("gpt_oss", "mlp.router.weight", False), ("jamba", "mamba.conv1d.weight", True)):
        targets = [n for n, _ in build(name).named_parameters() if n.endswith(ends)]
        wrapped(name, targets, tmp_path / name)
        tuned = fmoe.lora.load(tmp_path / name / "a", tmp_path / name / "base")
        save = lambda tuned=tuned, name=name: fmoe.lora.save(tuned.params, tmp_path / name / "b", tuned.adapter)
        if stack:
            with pytest.raises(fmoe.AdapterError, match="it adapts a stack"):
                save()
        else:
            assert {*save().target_parameters} == {*targets}
