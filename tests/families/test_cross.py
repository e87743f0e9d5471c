"""One family's checkpoint as another's: the same bytes under its names, and nothing lost that is not told."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from command import runner
from directories import files, load
from test_reload import output, reloaded

import fmoe
from fmoe.testing import same

NO_DENSE = dict(mlp_only_layers=[])


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> tuple[Any, Path]:
    """A Qwen3-MoE without dense layers, which no Mixtral has."""
    path = tmp_path_factory.mktemp("qwen3") / "hf"
    return hf.write("qwen3_moe", path, **NO_DENSE), path


def test_mixtral_as_qwen3_and_back_is_the_same_to_the_bit(tmp_path):
    model, source = zoo.saved("mixtral")
    there = fmoe.convert(source, tmp_path / "qwen3", to="qwen3_moe", lossy=True, fsync=False)
    assert [t for t in there.lost if "_norm.weight" not in t] == []
    found = load(tmp_path / "qwen3")
    w1 = load(source)["model.layers.1.block_sparse_moe.experts.7.w1.weight"]
    assert torch.equal(found["model.layers.1.mlp.experts.7.gate_proj.weight"], w1)
    config = json.loads((tmp_path / "qwen3/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])
    assert (config["num_experts"], config["moe_intermediate_size"], config["norm_topk_prob"]) == (8, 24, True)
    back = fmoe.convert(tmp_path / "qwen3", tmp_path / "back", to="mixtral", lossy=True, fsync=False)
    assert back.lost and all("_norm.weight" in text for text in back.lost), "Mixtral has none of Qwen3's norms"
    same(load(tmp_path / "back"), load(source))
    assert torch.equal(output(reloaded(model, tmp_path / "back")), output(model))


@pytest.mark.parametrize("to", ["qwen3_moe", "granitemoe", "minimax_m2", "llama4_text"])
def test_a_head_dim_of_null_is_what_its_class_derives(to, tmp_path):
    """As Transformers 5 saves every Mixtral; and of two names for a count the one that the target's class has."""
    config = transformers.MixtralConfig(
        **hf.MODELS["mixtral"][1] | dict(head_dim=None, num_attention_heads=4, hidden_size=32)
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    assert json.loads((tmp_path / "source/config.json").read_text())["head_dim"] is None
    told = fmoe.convert(tmp_path / "source", tmp_path / "other", to=to, lossy=True, fsync=False).lost
    made = json.loads((tmp_path / "other/config.json").read_text())
    assert made["head_dim"] == 8 and not any("self_attn.q_proj" in t or "experts.down_projs" in t for t in told)
    count = made.get("num_local_experts", made.get("num_experts"))
    assert count == config.num_local_experts and not {"num_experts", "num_local_experts"} <= made.keys()


@pytest.mark.parametrize(("name", "to"), [("granitemoe", "granitemoeshared"), ("granitemoeshared", "granitemoe")])
def test_what_carries_over_whole_needs_no_consent_and_computes_the_same(name, to, tmp_path):
    model, source = zoo.saved("granitemoe")
    if name == "granitemoeshared":
        fmoe.convert(source, tmp_path / "source", to=name, fsync=False)
        source = tmp_path / "source"
    report = fmoe.convert(source, tmp_path / "other", to=to, fsync=False)
    assert report.lost == ()
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "other", dtype=torch.float32, experts_implementation="eager"
    )
    assert other.config.model_type == to and torch.equal(output(other.eval()), output(model))


def test_blocks_of_the_other_family_compute_what_they_did(qwen3, tmp_path):
    model, source = qwen3
    report = fmoe.convert(source, tmp_path / "mixtral", to="mixtral", lossy=True, fsync=False)
    assert any("q_norm" in text for text in report.lost)
    mixtral, told = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "mixtral", dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(model.model.layers, mixtral.model.layers, strict=True):
        assert type(theirs.mlp).__name__ == "MixtralSparseMoeBlock"
        torch.testing.assert_close(hf.forward(theirs.mlp, x), hf.forward(mine.mlp, x), rtol=1e-6, atol=1e-6)
        assert torch.equal(theirs.self_attn.q_proj.weight, mine.self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("name", "to", "told"),
    [
        ("qwen3_moe", "mixtral", ["q_norm.weight' (3)", "mlp.gate_proj.weight'", "config mlp_only_layers=[1]"]),
        ("mixtral", "qwen3_moe", ["q_norm.weight' (2): qwen3_moe has them"]),
        ("qwen2_moe", "qwen3_moe", ["shared_experts.up_proj", "q_proj.bias", "n_shared_experts is 1 here, 0 there"]),
        ("olmoe", "qwen3_moe", ["q_norm.weight' (2): shape [32], qwen3_moe has [8]"]),
        ("granitemoe", "mixtral", ["norm_topk_prob is False here, True there", "config embedding_multiplier=1.0"]),
        ("deepseek_v3", "qwen3_moe", ["score_func is 'sigmoid' here, 'softmax' there", "e_score_correction_bias"]),
    ],
)
def test_what_would_be_lost_is_told_and_nothing_is_written(name, to, told, tmp_path):
    _, source = zoo.saved(name)
    with pytest.raises(fmoe.AdapterError, match=r"lossy=True \(--lossy\)") as error:
        fmoe.convert(source, tmp_path / "other", to=to)
    assert all(text in str(error.value) for text in told), str(error.value)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "to", "why"),
    [
        ("gpt_oss", "mixtral", r"gate and up lie as gpt_oss \[e d \(i g\)\]"),
        ("nemotron_h", "mixtral", "gate and up lie as"),
        ("mixtral", "kimi_k3", "Transformers has no causal language model 'kimi_k3'"),
        ("mixtral", "nothing", "to='nothing': expected 'native' or 'hf', or a model type"),
        ("mixtral", "zaya", r"Transformers builds no zaya(.|\n)*num_experts_per_tok"),
    ],
)
def test_what_cannot_be_at_all_is_an_error_even_with_consent(name, to, why, tmp_path):
    _, source = zoo.saved(name)
    with pytest.raises(fmoe.AdapterError, match=why):
        fmoe.convert(source, tmp_path / "other", to=to, lossy=True)


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    _, source = zoo.saved("mixtral")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(fmoe.AdapterError, match="pip install transformers"):
        fmoe.convert(source, tmp_path / "other", to="qwen3_moe")


def test_native_directories_and_layouts_give_the_same(qwen3, tmp_path):
    _, source = qwen3
    how = dict(to="mixtral", lossy=True, fsync=False)
    fmoe.convert(source, tmp_path / "native", fsync=False)
    for path, name, more in ((source, "a", {}), (tmp_path / "native", "b", {}), (source, "c", dict(layout="fused"))):
        fmoe.convert(path, tmp_path / name, **how, **more)
    one, two = files(tmp_path / "a"), files(tmp_path / "b")
    assert {n for n in one if one[n] != two[n]} <= {"model.safetensors.index.json"} and one.keys() == two.keys()
    same(load(tmp_path / "a"), load(tmp_path / "b"))
    fused = load(tmp_path / "c")
    assert not any("q_norm" in n for n in (*fused, *load(tmp_path / "a")))
    gate_up = fused["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[3, :24], load(tmp_path / "a")["model.layers.0.block_sparse_moe.experts.3.w1.weight"])
    assert "tokenizer.json" in one


def test_tensors_of_another_shape_are_left_out(tmp_path):
    _, source = zoo.saved("olmoe")
    report = fmoe.convert(source, tmp_path / "qwen3", to="qwen3_moe", lossy=True, fsync=False)
    assert any("q_norm.weight' (2): shape [32], qwen3_moe has [8]: left out" in text for text in report.lost)
    found = load(tmp_path / "qwen3")
    assert (
        load(source).keys() - found.keys() == {n for n in load(source) if "_norm" in n}
        and not found.keys() - load(source).keys()
    )


def test_a_block_of_another_name_is_renamed(tmp_path):
    """LFM2's `feed_forward` and Mixtral's `mlp`, both ways; the rest of these two has little in common."""
    _, source = zoo.saved("jamba")
    shutil.copytree(source, tmp_path / "jamba")
    fmoe.convert(source, tmp_path / "mixtral", to="mixtral", lossy=True, fsync=False)
    found, was = load(tmp_path / "mixtral"), load(source)
    experts = {n: t for n, t in was.items() if ".experts." in n}
    assert experts
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, tensor in experts.items():
        part = next(p for p in names if p in name)
        as_mixtral = name.replace("feed_forward", "block_sparse_moe").replace(part, names[part])
        assert torch.equal(found[as_mixtral], tensor)


def test_the_command_line_tells_on_standard_error_and_wants_consent(tmp_path, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    _, source = zoo.saved("mixtral")
    code, out, err = run("convert", str(source), str(tmp_path / "other"), "--to", "qwen3_moe")
    assert code == 1 and not out and "q_norm.weight' (2): qwen3_moe has them" in err and "lossy" in err
    code, out, err = run("convert", str(source), str(tmp_path / "other"), "--to", "qwen3_moe", "--lossy", "--json")
    told = json.loads(out)
    assert code == 0 and told["lost"] and "fmoe: lost: 'model.layers.*.self_attn.k_norm.weight' (2)" in err
    assert (tmp_path / "other/config.json").exists()
