"""Directories of other systems: there and back, to each other."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from system_directories import files, same, saved
from systems_zoo import cases

import fmoe
from fmoe import AdapterError
from fmoe.systems import SYSTEMS

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name,system",
    [
        ("qwen3_moe alike", "torchtitan"),
        ("deepseek_v3", "megatron_dist"),
        ("gpt_oss", "megatron_dist"),
        ("qwen3_moe alike", "mlx"),
        ("qwen3_moe alike", "vllm"),
        ("deepseek_v3", "deepseek"),
        ("gpt_oss", "gpt_oss_original"),
    ],
)
def test_there_and_back(hf, tmp_path, name, system):
    path, config, tensors = hf(name)
    report = fmoe.convert(path, tmp_path / "there", to=system, max_shard_size="50KB")
    assert report.sides.startswith("hf (safetensors") and system in report.sides and "proved bijective" in report.sides
    want = fmoe.adapter(config["model_type"], config, system=system).from_hf(tensors)
    if (tmp_path / "there" / ".metadata").exists():
        found = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in want.items()}
        dcp.load(found, checkpoint_id=str(tmp_path / "there"), no_dist=True)
        same(found, want)
    else:
        same(files(tmp_path / "there"), want)
    fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    same(files(tmp_path / "back"), tensors)
    assert fmoe.verify(tmp_path / "there").tensors == len(want)
    assert fmoe.inspect(tmp_path / "there")["format"] == system


PARTS = [(m, s) for s, m, c in cases() if not c and m in ("qwen3_moe alike", "deepseek_v3", "gpt_oss") and s != "gguf"]


@pytest.mark.parametrize("name,system", PARTS)
def test_some_experts_of_a_system_are_those_of_hugging_faces(hf, tmp_path, name, system):
    path, _, _ = hf(name)
    fmoe.convert(path, tmp_path / "there", to=system, fsync=False)
    made = {}
    for src, how in ((path, {}), (tmp_path / "there", dict(config=path, from_=system))):
        out = tmp_path / f"part of {src.name}"
        fmoe.convert(src, out, "native", e=range(1, 3), fsync=False, **how)
        made[src.name] = files(out), json.loads((out / "fmoe.json").read_text())
    (want, said), (found, also) = made.values()
    same(found, want)
    assert (said["weight_map"].keys(), said["ranges"]) == (also["weight_map"].keys(), also["ranges"])


@pytest.mark.parametrize(
    "lost", ["mlp.gate.weight", "self_attn.q_proj.weight", "input_layernorm.weight", "mlp.experts"]
)
@pytest.mark.parametrize("system", ["torchtitan", "mlx", "vllm"])
def test_what_a_source_has_lost_is_missed_on_the_way_to_a_system_and_from_it(hf, tmp_path, system, lost):
    path, _, tensors = hf("qwen3_moe alike")
    fmoe.convert(path, tmp_path / "whole", to=system)
    left = {n: t for n, t in tensors.items() if not n.startswith(f"model.layers.1.{lost}")}
    assert len(left) < len(tensors)
    save_file(left, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="layers.1"):
        fmoe.convert(path, tmp_path / "there", to=system)
    assert not (tmp_path / "there").exists()
    if lost == "self_attn.q_proj.weight":
        return  # of systems that fuse q, k and v the table itself refuses it, whatever is asked
    assert any("layers.1" in text for text in fmoe.convert(path, tmp_path / "there", to=system, lossy=True).lost)
    there = tmp_path / "there"
    assert any("layers.1" in text for text in fmoe.inspect(there)["problems"])
    for refused in (lambda: fmoe.convert(there, tmp_path / "back", to="hf"), lambda: fmoe.verify(there)):
        with pytest.raises(AdapterError, match="layers.1(.|\n)*not whole"):
            refused()


def test_files_that_do_not_go_to_a_system_are_named(hf, tmp_path):
    path, _, tensors = hf("qwen3_moe alike")
    others = ["modeling_own.py", "optimizer.pt", "pytorch_model.bin", "deep/inner.safetensors"]
    for name in (*others, "tokenizer.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"{}")
    report = fmoe.convert(path, tmp_path / "there", to="torchtitan")
    assert (tmp_path / "there" / "tokenizer.json").exists()
    assert [n for n in report.notes if n.startswith("not taken along") and all(o in n for o in others)]
    fmoe.convert(path, tmp_path / "other", to="mlx", max_shard_size="20KB")
    again = fmoe.convert(path, tmp_path / "other", to="vllm", force=True)
    assert any("of the former model, removed" in n for n in again.notes)


def test_a_directory_without_config_takes_one_and_goes_to_a_third(hf, tmp_path):
    path, config, tensors = hf("qwen3_moe alike")
    theirs = fmoe.adapter("qwen3_moe", config, system="torchtitan").from_hf(tensors)
    noise = {"optimizer.exp_avg": torch.ones(3), "train_state": torch.ones(1)}
    titan = saved(tmp_path / "titan", theirs | noise)
    with pytest.raises(AdapterError, match="--config"):
        fmoe.convert(titan, tmp_path / "no", to="hf")
    report = fmoe.convert(titan, tmp_path / "megatron", to="megatron_dist", config=path)
    assert "optimizer.exp_avg" in " ".join(report.notes)
    fmoe.convert(tmp_path / "megatron", tmp_path / "back", to="hf")
    same(files(tmp_path / "back"), tensors)
    assert (tmp_path / "megatron" / "metadata.json").exists()
    fmoe.convert(path, tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "vllm", to="vllm")
    (tmp_path / "vllm" / "config.json").unlink()
    with pytest.raises(AdapterError, match="config.json is missing.*--config DIR_OR_JSON"):
        fmoe.inspect(tmp_path / "vllm")
    assert fmoe.inspect(tmp_path / "vllm", config=path)["format"] == "vllm"
    same(files(tmp_path / "vllm"), fmoe.adapter("qwen3_moe", config, system="vllm").from_hf(tensors))


def test_old_names_of_a_source_are_found(hf, tmp_path):
    path, config, tensors = hf("qwen3_moe alike")
    old = fmoe.adapter("qwen3_moe", config, system="torchtitan", names="0.2").from_hf(tensors)
    fmoe.convert(saved(tmp_path / "old", old), tmp_path / "back", to="hf", config=config)
    same(files(tmp_path / "back"), tensors)


def test_padding_that_is_not_zero_is_refused_unless_lossy(hf, tmp_path):
    path, config, tensors = hf("qwen3_moe alike")
    fmoe.convert(path, tmp_path / "there", to="megatron_dist", vocab_multiple=96)
    fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    same(files(tmp_path / "back"), tensors)
    theirs = fmoe.adapter("qwen3_moe", config, system="megatron_dist", vocab_multiple=96).from_hf(tensors)
    theirs["embedding.word_embeddings.weight"][70] = 1
    dirty = saved(tmp_path / "dirty", theirs)
    with pytest.raises(AdapterError, match="word_embeddings.*not zero"):
        fmoe.convert(dirty, tmp_path / "no", to="hf", config=config)
    assert not list((tmp_path / "no").glob("*")) if (tmp_path / "no").exists() else True
    fmoe.convert(dirty, tmp_path / "cut", to="hf", config=config, lossy=True)
    same(files(tmp_path / "cut"), tensors)


def test_parameters_by_name_are_told_from_a_trainers_directory(hf, tmp_path):
    path, _, _ = hf("qwen3_moe alike")
    notes = fmoe.convert(path, tmp_path / "there", to="megatron", dry_run=True).notes
    assert any("a trainer's directory is --to megatron_dist" in note for note in notes)
    assert not any("megatron_dist" in n for n in fmoe.convert(path, tmp_path / "d", to="mlx", dry_run=True).notes)


@pytest.mark.parametrize("system", SYSTEMS)
def test_between_systems_no_dtype_changes_and_cast_says_where_it_does(tmp_path, system):
    for to, from_ in ((system, "hf"), ("hf", system), ("native", system)):
        with pytest.raises(AdapterError, match="cast='all' with to='.*keeps its dtype.*convert to 'hf', and that with"):
            fmoe.convert(tmp_path, tmp_path / "there", to=to, from_=from_, dtype="bfloat16", cast="all")
    assert not (tmp_path / "there").exists()
