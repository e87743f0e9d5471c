"""LoRA of parameters that are no experts': stacks, tables, convolutions, those of another name than `weight`.

Every one that PEFT wraps in any model, against its own merge in fp64: of a model in memory and of its directory.
"""

import re
from typing import Any

import peft
import pytest
import torch
from peft_cases import ALPHA, MODELS, WARNS, R, adapter_of, build, parameters
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.families.spelling import spelt
from fmoe.lowrank.layers import deep
from fmoe.testing import same

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")]
LINEAR = (torch.nn.Linear, torch.nn.Embedding)
FILE = "adapter_model.safetensors"


def starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def kinds(name: str) -> dict[str, list[str]]:
    """What PEFT can wrap besides linear modules and experts, a layer's number a star -> all of it."""
    model = build(name)
    stacked = parameters(adapter_of(model))
    linear = {n for n, m in model.named_modules() if isinstance(m, LINEAR)}
    made: dict[str, list[str]] = {}
    for n, p in model.named_parameters():
        experts = n.endswith(tuple(stacked)) or ".experts." in n and not n.endswith(".weight")
        if p.ndim in (2, 3) and n.rpartition(".")[0] not in linear and not experts:
            made.setdefault(starred(n), []).append(n)
    return made


def wrapped(name: str, targets: list[str], path: Any) -> tuple[Any, dict[str, Any]]:
    """PEFT's model in fp64 with random matrices of these parameters, in directories; and its tensors before."""
    model = build(name).double()
    model.save_pretrained(path / "base")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
    made = peft.get_peft_model(model, config)
    drawn = torch.Generator().manual_seed(1)
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=drawn))
    made.save_pretrained(path / "a")
    return made, before


def agree(ours: dict[str, Any], theirs: dict[str, Any], before: dict[str, Any], count: int) -> None:
    assert ours.keys() == theirs.keys()
    assert sum(not torch.equal(before[n], t) for n, t in theirs.items()) == count
    for n, t in theirs.items():
        torch.testing.assert_close(ours[n], t, rtol=0, atol=1e-10)


SOME = ["jetmoe", "inkling_text", "deepseek_v4", "aria", "inkling2_loop", "qwen3_next", "ernie4_5_vl_moe"]
ALL = pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])


@ALL
def test_it_is_merged_as_peft_does_and_missed_where_it_is_lost(name, tmp_path):
    for i, (kind, targets) in enumerate(kinds(name).items()):
        at = tmp_path / str(i)
        try:
            made, memory = wrapped(name, targets, at)
        except ValueError as error:
            assert "incompatible with Mamba" in str(error)
            continue
        adapter = adapter_of(build(name))
        files = load_file(at / "a" / FILE)
        tuned = fmoe.lora.load(at / "a", adapter)
        same(tuned.adapter.to_hf(tuned.params), files)
        fmoe.lora.save(tuned.params, at / "again", tuned.adapter, tuned.config)
        same(load_file(at / "again" / FILE), files)
        merged, before = made.merge_and_unload(), adapter.from_hf(memory)
        ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
        agree(ours, adapter.from_hf(merged.state_dict()), before, len(targets))
        merged.save_pretrained(at / "merged")
        tuned, before = fmoe.lora.load(at / "a", at / "base"), fmoe.load(at / "base")
        theirs = fmoe.load(at / "merged")
        changed = sum(not torch.equal(before[n], t) for n, t in theirs.items())
        cut = [] in (spelt()[made.config.model_type].get(n) for n in (kind, kind.removesuffix(".weight")))
        try:
            ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
            agree(ours, theirs, before, changed)
        except fmoe.AdapterError as error:  # no tensor of its own in files, and no rule knows how: from memory alone
            assert cut and re.search(r"has no weight.*Fix.*model.state_dict\(\)", str(error))
        named = len(targets) > 1 and "correction_bias" not in kind  # whose layers the class's names do not tell
        for lost in (targets[0], targets[-1]) if named else ():
            module = f"base_model.model.{lost.rpartition('.')[0]}.lora_"
            save_file({n: t for n, t in files.items() if not n.startswith(module)}, at / "a" / FILE)
            with pytest.raises(fmoe.AdapterError, match="no matri"):
                fmoe.lora.load(at / "a", at / "base")


@ALL
def test_load_knows_which_are_stacks(name):
    """Of every class, by the names that the model in memory has: a rank of several times r is of a stack alone."""
    adapter, shapes = adapter_of(build(name)), {n: p.ndim for n, p in build(name).named_parameters()}
    for kind, (first, *_) in kinds(name).items():
        found = deep(adapter, first)
        assert found in (None, shapes[first]), kind
        known = found or shapes[first] == 3 or kind.endswith(("norm.scale", "correction_bias", "position_bias"))
        assert known, f"{kind}: not known, and so of any rank"


TABLES = {"inkling2": ["embed_tokens", "position_embedding"], "inkling_text": ["embed_tokens"],
          "step3p7": ["position_embedding"], "aria": ["position_embedding"]}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("changed", [False, True])
def test_tables_that_files_call_otherwise_and_tensors_beside_their_weight(changed, name, tmp_path):
    """Inkling's embedding holds a norm, which PEFT writes beside its matrices, and puts in the place of the base's."""
    model = build(name).double()
    model.save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TABLES[name]))
    for n, p in made.named_parameters():
        if ".lora_" in n or changed and "embed_norm" in n:
            p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    made.save_pretrained(tmp_path / "a")
    assert any("embed_norm" in n for n in load_file(tmp_path / "a" / FILE)) == ("embed_tokens" in TABLES[name])
    tuned, before = fmoe.lora.load(tmp_path / "a", tmp_path / "base"), fmoe.load(tmp_path / "base")
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    more = changed and "embed_tokens" in TABLES[name]
    ours, theirs = fmoe.lora.merge(before, tuned.params, tuned.scales), fmoe.load(tmp_path / "merged")
    agree(ours, theirs, before, len(TABLES[name]) + more)


def test_a_lost_module_is_not_outweighed_by_others_of_the_same_end(tmp_path):
    """Step's tower has q_proj in memory, and not in files: as many of its own as are lost of the text model."""
    model = build("step3p7")
    model.save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path / "a")
    files = load_file(tmp_path / "a" / FILE)
    text, tower = ([n for n in files if part in n and "lora_A" in n] for part in ("language_model", "vision_model"))
    assert text and tower
    fmoe.lora.load(tmp_path / "a", tmp_path / "base")
    lost = text[0].partition(".lora_")[0]
    save_file({n: t for n, t in files.items() if not n.startswith(f"{lost}.")}, tmp_path / "a" / FILE)
    with pytest.raises(fmoe.AdapterError, match="q_proj': no matrices"):
        fmoe.lora.load(tmp_path / "a", tmp_path / "base")
