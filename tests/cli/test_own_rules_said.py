"""Your own rules on the command line: a Family, a drop, a module that fails as it is imported; and what is printed."""

import json

import pytest
import torch
from command import Run, runner
from safetensors.torch import save_file

import fmoe
import fmoe.docs
from fmoe import drop, keep, rule

RULES = """
import fmoe
family = fmoe.families.Family(
    model_types=("mine",),
    rules=fmoe.rule("{l}.moe.{e}.{g=gate|up} [i d]", "{l}.moe.experts.gate_and_up_projs [e d (g i)]")
    | fmoe.rule("{l}.moe.{e}.down [d i]", "{l}.moe.experts.down_projs [e i d]")
    | fmoe.keep("{rest}"),
    fields=dict(n_routed_experts="n", n_activated_experts="k", dim="hidden_size", moe_inter_dim="expert_size"),
)
dropped = fmoe.keep("{l}.moe.{e}.{rest}") | fmoe.drop("head", because="tied") | fmoe.keep("{rest}")
"""
DROPPED = "'head': dropped by your rule drop('head', because='tied')"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Run:
    monkeypatch.chdir(tmp_path)
    hf = {f"0.moe.{e}.{p}": torch.randn(6, 4) for e in range(3) for p in ("gate", "up")}
    hf |= {f"0.moe.{e}.down": torch.randn(4, 6) for e in range(3)} | {"head": torch.randn(2, 4), "norm": torch.ones(4)}
    (tmp_path / "hf").mkdir()
    save_file(hf, tmp_path / "hf/model.safetensors")
    config = {"model_type": "mine", "n": 3, "k": 2, "hidden_size": 4, "expert_size": 6}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    (tmp_path / "said_rules.py").write_text(RULES)
    return runner(monkeypatch, capsys)


def test_a_family_is_taken_where_an_adapter_is(run, tmp_path):
    for command in (["plan", "hf"], ["verify", "hf"], ["inspect", "hf"], ["convert", "hf", "native"]):
        assert run(*command, "--adapter", "said_rules:family", columns=200)[0] == 0, command
    code, out, err = run("convert", "native", "back", "--to", "hf", "--adapter", "said_rules:family", columns=300)
    assert code == 0 and "prints other rules" not in out + err
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    from said_rules import family

    native = fmoe.load("hf", adapter=family)
    assert native["0.moe.experts.gate_and_up_projs"].shape == (3, 4, 12)
    assert fmoe.save(native, "saved", family).made == 11
    with pytest.raises(fmoe.AdapterError, match=r"is unknown\. .* the group fmoe\.families .* known ones"):
        fmoe.load("hf")


def test_what_a_drop_takes_is_named_there_back_and_in_the_proof(run, tmp_path):
    own = ("--adapter", "said_rules:dropped")
    code, out, err = run("convert", "hf", "native", *own, columns=300)
    assert code == 0 and DROPPED in err
    code, out, err = run("convert", "native", "back", "--to", "hf", *own, columns=300)
    assert code == 1 and DROPPED in err and "download" not in err
    code, out, err = run("verify", "hf", *own, columns=300)
    assert code == 1 and "'head' does not come back: dropped by your rule drop('head', because='tied')" in err
    renamed = fmoe.rename("head", "lm_head") >> (drop("lm_head", because="tied") | keep("{pre}.{rest}") | keep("norm"))
    with pytest.raises(fmoe.AdapterError, match=r"'head' does not come back: dropped by your rule drop\('lm_head'"):
        fmoe.verify("hf", adapter=renamed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import fmoe\nfmoe.rule('a', 'b', z=3)", "importing fails_here raised AdapterError: rule a"),
        ("1 / 0", "importing fails_here raised ZeroDivisionError: division by zero"),
        ("import not_installed_here", "importing fails_here raised ModuleNotFoundError: No module named 'not_in"),
        ("x = (", "importing fails_here raised SyntaxError"),
    ],
)
def test_a_module_that_raises_is_told_from_a_name_that_is_wrong(text, said, run, tmp_path):
    import sys

    sys.modules.pop("fails_here", None)
    (tmp_path / "fails_here.py").write_text(text + "\n")
    code, _, err = run("verify", "hf", "--adapter", "fails_here:mine", columns=300)
    assert code == 2 and said in err and "expected package.module:name" not in err


def test_rules_and_what_was_tuned_print_short(tmp_path):
    path = fmoe.docs.example()
    adapter = fmoe.adapter(path)
    assert max(map(len, str(adapter).split("\n"))) < 260 and "more}" in str(adapter) and len(str(adapter)) < 4000
    rules = fmoe.inspect(path)
    assert len(rules["rules_used"]) > 2 and {*rules["rules_used"]} <= {*rules["rules"]}
    fmoe.lora.save(fmoe.lora.init(fmoe.load(path), r=4), tmp_path / "lora", adapter)
    tuned = fmoe.lora.load(tmp_path / "lora", path)
    assert repr(tuned).startswith("Tuned(8 tensors, r=4, lora_alpha=32, Adapter(qwen3_moe") and len(repr(tuned)) < 200


def test_parts_that_are_missing_are_asked_for_by_what_is_there():
    qkv = rule("{pre}{p=q|k|v}_proj [p d]", "{pre}qkv [(q|k|v) d]", q=4, k=2, v=2)
    with pytest.raises(fmoe.AdapterError, match="expected all of its parts, since 'a.q_proj' is there"):
        qkv.from_hf({"a.q_proj": torch.ones(4, 3)})
