"""A rule of one's own that matches no name is said by the plan, conversion and verification; families' are not."""

import json
import re

import pytest
import torch
from command import runner
from safetensors.torch import save_file

import fmoe
from fmoe import drop, keep, rename, rule

NAMES = ("model.layers.0.self_attn.q.weight", "model.layers.1.self_attn.q.weight", "model.norm.weight", "head")
SPECS = {name: fmoe.TensorSpec((2, 3), torch.float32) for name in NAMES}
MIDDLE = "is in the middle of some. Fix: {pre}"


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (rename("self_attn.", "attention."), f"rule self_attn.{{rest}} .* {MIDDLE}self_attn.{{rest}}"),
        (rename("self_attn", "attention"), f"rule self_attn .* {MIDDLE}self_attn"),
        (rename("layers.", "blocks."), f"rule layers.{{rest}} .* {MIDDLE}layers.{{rest}}  <->  {{pre}}blocks"),
        (rename("modle.", "policy."), "rule modle.{rest} .* matches no name. Did you mean 'model'?"),
        (drop("haed", because="tied") | keep("{rest}"), "drop haed .* matches no name. Did you mean 'head'?"),
        (keep("{pre}nrm.{rest}") | keep("{rest}"), "keep {pre}nrm.{rest} matches no name"),
        (rule("{l}.up [i d]", "{l}.down [d i]") | keep("{rest}"), "rule {l}.up .* matches no name"),
        ((rename("a.", "b.") >> rename("c.", "d.")) | keep("head"), "rule a.{rest} .* matches no name"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_a_note(adapter, said):
    pattern = ".*".join(map(re.escape, said.split(" .* ")))
    plan = (keep("{rest}") >> adapter).plan(SPECS)
    assert any(re.search(pattern, note) and note.startswith("stage ") for note in plan.notes), plan.notes
    assert all(f"note: {note}" in str(plan) for note in plan.notes)


@pytest.mark.parametrize(
    "adapter",
    [
        rename("model.", "policy."),
        rename("head", "lm_head"),
        rename("model.norm", "model.final"),
        rename("model.layers.{l}.self_attn", "model.layers.{l}.attention"),
        rename("{pre}self_attn.", "{pre}attention."),
        rename("{pre}self_attn.{rest}", "{pre}attention.{rest}"),
        fmoe.alias("lm_head", of="head") | keep("{rest}"),
    ],
    ids=str,
)
def test_what_matches_is_none_and_comes_back(adapter):
    plan = adapter.plan(SPECS)
    assert not plan.notes and (set(plan.targets) != set(SPECS) or "alias" in str(adapter) or "lm_head" in str(adapter))
    back = adapter.inverse.plan(plan.targets)
    assert not back.notes and back.targets.keys() == SPECS.keys()


def test_families_and_systems_have_rules_for_models_that_are_not_here():
    path = fmoe.docs.example()
    base = fmoe.adapter(path)
    specs = {n: fmoe.TensorSpec(tuple(t.shape), t.dtype) for n, t in base.to_hf(fmoe.load(path)).items()}
    assert base.plan(specs).notes == ()
    config = dict(base.config) | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    for system in ("megatron", "torchtitan", "vllm"):
        adapter = fmoe.adapter("qwen3_moe", config, system=system)
        assert adapter.plan(specs).notes == () and adapter.inverse.plan(adapter.plan(specs).targets).notes == ()
    assert len((base >> rename("modle.", "policy.")).plan(specs).notes) == 1


def test_a_dot_on_one_side_is_refused_when_it_is_written():
    for old, new in (("model.", "policy"), ("model", "policy.")):
        with pytest.raises(fmoe.AdapterError, match="and the other does not. Fix: 'model.' <-> 'policy.'"):
            rename(old, new)
    assert rename("model.", "") == rename("", "model.").inverse


def test_directories_say_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "hf").mkdir()
    save_file({n: torch.ones(s.shape) for n, s in SPECS.items()}, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "mine"}))
    (tmp_path / "idle_rules.py").write_text("import fmoe\nmine = fmoe.rename('modle.', 'policy.')\n")
    monkeypatch.chdir(tmp_path)
    mine, said = rename("modle.", "policy."), "rule modle.{rest}  <->  policy.{rest} matches no name"
    for report in (
        fmoe.verify("hf", adapter=mine),
        fmoe.convert("hf", "native", adapter=mine),
        fmoe.convert("native", "back", "hf", adapter=mine),
    ):
        assert any("matches no name" in note for note in report.notes)
    run = runner(monkeypatch, capsys)
    for command in (["plan", "hf"], ["plan", "hf", "--json"], ["verify", "hf"], ["convert", "hf", "again"]):
        code, out, err = run(*command, "--adapter", "idle_rules:mine")
        assert code == 0 and said in out + err, command
