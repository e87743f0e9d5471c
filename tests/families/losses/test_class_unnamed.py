"""A config that names no class, another's, or one with a head for a task: what is lost is told all the same."""

import re
from collections.abc import Iterable
from itertools import groupby

import hf
import hf_zoo as zoo
import known_names
import known_saved
import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.towers import HEADS, class_note

NAMES = [*hf.MODELS, *zoo.MODELS]


def built(name: str) -> tuple[dict, list[str]]:
    config, names = known_saved.named(known_saved.unfilled(*known_names.base(name)), name, True)
    return config, sorted(names)


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in numbers alone."""
    return [list(same) for _, same in groupby(sorted(names, key=stripped), key=stripped)]


def stripped(name: str) -> str:
    return re.sub(r"\d+", "#", name)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_class_what_that_of_its_model_type_has_is_told(name):
    config, names = built(name)
    kind, named = FAMILIES[config["model_type"]], dict(config)
    del config["architectures"]
    whole = gaps(kind, config, names)
    assert not whole.problems and not [n for n in whole.notes if "names no class" in n]
    for lost in alike(names):
        left = [n for n in names if n not in lost]
        if gaps(kind, named, left).problems:
            told = gaps(kind, config, left)
            assert told.problems or [n for n in told.notes if "names no class" in n and repr(lost[0]) in n], lost


THERE = {*dir(transformers)}
MADE = [(n, task, arch.partition("For")[0] + task)
        for n, (arch, _) in (hf.MODELS | zoo.MODELS).items() for task in HEADS]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "made"), [m for m in MADE if m[2] in THERE])
def test_the_head_of_a_class_for_a_task_is_missed(name, task, made):
    config = known_names.base(name)[1]
    given, names = known_saved.named(known_saved.unfilled(getattr(transformers, made), config), name, True)
    kind = FAMILIES[given["model_type"]]
    assert gaps(kind, given, names).problems == []
    for part in HEADS[task]:
        assert part in {k for p in gaps(kind, given, names - {part}).problems for k in p.keys}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_of_tied_embeddings_either_end_is_enough_and_none_is_a_loss(name):
    """`safetensors.torch.save_model` keeps the name that comes first in the alphabet: lm_head."""
    config, names = built(name)
    kind, config = FAMILIES[config["model_type"]], config | {"tie_word_embeddings": True}
    ends = {n for n in names if "lm_head" in n or n.endswith("embed_tokens.weight")}
    assert len(ends) == 2
    for kept in ends:
        assert gaps(kind, config, {*names} - ends | {kept}).problems == []
    assert gaps(kind, config, {*names} - ends).problems


def test_a_text_model_with_a_head_of_its_own_ties_it_by_its_own_word():
    cls, config = known_names.base("llama4")
    config.text_config.tie_word_embeddings = True
    tied, names = known_saved.named(known_saved.unfilled(cls, config), "llama4", True)
    assert tied["tie_word_embeddings"] is False and not any("lm_head" in n for n in names)
    assert gaps(FAMILIES["llama4"], tied, names).problems == []
    tied["tie_word_embeddings"], tied["text_config"]["tie_word_embeddings"] = True, False
    assert gaps(FAMILIES["llama4"], tied, names).problems[0].keys == ("language_model.lm_head.weight",)


@pytest.mark.parametrize("original", [True, False], ids=["published", "in memory"])
@pytest.mark.parametrize("name", [n for n in NAMES if known_names.two_parts(n)])
def test_a_base_class_with_a_tower_or_an_encoder_misses_what_it_lost(name, original):
    cls, config = known_names.two_parts(name), known_names.base(name)[1]
    given, names = known_saved.named(known_saved.unfilled(cls, config), name, original)
    whole, more = known_saved.named(known_saved.unfilled(*known_names.base(name)), name, original)
    kind = FAMILIES[given["model_type"]]
    assert gaps(kind, given, names) == gaps(kind, given, more) == gaps(kind, whole, more) == ([], [])
    for lost in alike(names):
        assert {*lost} & {k for p in gaps(kind, given, [n for n in names if n not in lost]).problems for k in p.keys}


LONGER = [(n, f) for n in NAMES for f in ("num_hidden_layers", "depth")
          if isinstance(getattr(getattr(known_names.base(n)[1], "vision_config", None), f, None), int)]  # fmt: skip


@pytest.mark.parametrize(("name", "field"), [row for row in LONGER if row[0] != "dots3_note"])  # by lists of as many
def test_a_layer_of_a_tower_that_is_lost_whole_is_missed(name, field):
    cls, config = known_names.base(name)
    setattr(config.vision_config, field, 2)
    given, names = known_saved.named(known_saved.unfilled(cls, config), name, True)
    firsts = {hit[0] for n in names if (hit := re.match(r"(.*(vis|vit).*\.(layers|\w*blocks?))\.0\.", n))}
    assert firsts and gaps(FAMILIES[given["model_type"]], given, names).problems == []
    for first in firsts:
        problems = gaps(FAMILIES[given["model_type"]], given, [n for n in names if not n.startswith(first)]).problems
        assert any(k.startswith(first) for p in problems for k in p.keys), first


@pytest.mark.parametrize("name", NAMES)
def test_of_a_class_that_transformers_builds_of_a_config_there_is_no_note(name):
    config = type(known_names.base(name)[1])
    maps = [m for n, m in vars(modeling_auto).items() if n.startswith("MODEL_") and n.endswith("_NAMES")]
    listed = {arch for m in maps if isinstance(arch := m.get(config.model_type), str)} & THERE
    made = [arch for arch in sorted(listed) if getattr(transformers, arch).config_class is config]  # not of its text
    assert [a for a in made if class_note({"model_type": config.model_type, "architectures": [a]})] == []


def test_a_class_that_is_not_known_is_told():
    config, names = built("mixtral")
    config["architectures"] = ["MyMixtralForCausalLM"]
    kind = FAMILIES["mixtral"]
    [note] = gaps(kind, config, names).notes
    assert note.startswith("config.json names MyMixtralForCausalLM in architectures, which is not known")
    for known_too in ("MixtralModel", "MixtralForCausalLM"):
        assert gaps(kind, config | {"architectures": [known_too]}, names).notes == []


@pytest.mark.parametrize("archs", [None, ["MixtralForSequenceClassification"], ["MyMixtralForCausalLM"]])
def test_sizes_are_the_configs_whatever_class_it_names(archs):
    config, names = built("mixtral")
    config |= {"architectures": archs, "vocab_size": 7}
    spec = {"model.embed_tokens.weight": torch.empty(9, 8, device="meta")}
    found = gaps(FAMILIES["mixtral"], config, dict.fromkeys(names) | spec)
    assert any("vocab_size 7" in told for told in (*(p.text for p in found.problems), *found.notes))
    assert not archs or found.problems
