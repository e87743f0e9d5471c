"""Directories of other systems: there and back, to each other, as torch writes and reads them; and broken ones."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from systems_zoo import model

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers import pickles
from fmoe.checkpoint.files.containers.torch_dcp import open_dcp

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def hf(tmp_path):
    """name -> the directory of a model as Hugging Face has it, and its tensors."""

    def made(name):
        config, tensors = model(name)
        path = tmp_path / "hf"
        path.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config, default=str))
        return path, config, tensors

    return made


def files(path):
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def saved(path, tensors):
    """As torch itself writes it."""
    dcp.save(dict(tensors), checkpoint_id=str(path), no_dist=True)
    return path


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
    same(files(tmp_path / "vllm"), fmoe.adapter("qwen3_moe", config, system="vllm").from_hf(tensors))


def test_old_names_of_a_source_are_found(hf, tmp_path):
    path, config, tensors = hf("qwen3_moe alike")
    old = fmoe.adapter("qwen3_moe", config, system="torchtitan", names="0.2").from_hf(tensors)
    fmoe.convert(saved(tmp_path / "old", old), tmp_path / "back", to="hf", config=config)
    same(files(tmp_path / "back"), tensors)


def chunked(path, name, whole, boxes, edit=lambda m: None):
    """One tensor in several chunks, as ranks of a mesh write it."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata as Chunk
    from torch.distributed.checkpoint.metadata import MetadataIndex

    parts = {
        f"{i}": whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].clone() for i, box in enumerate(boxes)
    }
    saved(path, parts)
    meta = pickle.loads((path / ".metadata").read_bytes())
    one = meta.state_dict_metadata["0"]
    one.size, one.chunks = whole.shape, [Chunk(torch.Size(o), torch.Size(n)) for o, n in boxes]
    stored = {index.fqn: info for index, info in meta.storage_data.items()}
    meta.storage_data = {MetadataIndex(name, torch.Size(o), i): stored[str(i)] for i, (o, n) in enumerate(boxes)}
    meta.state_dict_metadata = {name: one}
    edit(meta)
    (path / ".metadata").write_bytes(pickle.dumps(meta))
    return path


BOXES = [((0, 0), (3, 4)), ((0, 4), (3, 2)), ((3, 0), (3, 6))]


def test_chunks_of_any_cut_are_put_together(tmp_path):
    from fmoe.checkpoint.files.containers.source import open_foreign

    whole = torch.arange(36.0).view(6, 6)
    source = open_foreign(chunked(tmp_path / "d", "w", whole, BOXES), {})
    assert torch.equal(source.read(["w"])["w"], whole)


def test_a_sharded_model_converts_through_the_engine(hf, tmp_path):
    path, config, tensors = hf("qwen3_moe alike")
    theirs = fmoe.adapter("qwen3_moe", config, system="torchtitan").from_hf(tensors)
    halves = {}
    for name, t in theirs.items():
        halves |= {f"{name}@{i}": part.clone() for i, part in enumerate(t.chunk(2, 0))}
    titan = saved(tmp_path / "titan", halves)
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata as Chunk
    from torch.distributed.checkpoint.metadata import MetadataIndex

    meta = pickle.loads((titan / ".metadata").read_bytes())
    stored = {index.fqn: info for index, info in meta.storage_data.items()}
    listed, places = {}, {}
    for name, t in theirs.items():
        one, at = meta.state_dict_metadata[f"{name}@0"], 0
        one.size, one.chunks = t.shape, []
        for i, part in enumerate(t.chunk(2, 0)):
            offset = torch.Size([at] + [0] * (t.ndim - 1))
            one.chunks.append(Chunk(offset, part.shape))
            places[MetadataIndex(name, offset, i)] = stored[f"{name}@{i}"]
            at += part.shape[0]
        listed[name] = one
    meta.state_dict_metadata, meta.storage_data = listed, places
    (titan / ".metadata").write_bytes(pickle.dumps(meta))
    fmoe.convert(titan, tmp_path / "back", to="hf", config=config)
    same(files(tmp_path / "back"), tensors)


class Evil:
    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return (os.system, (f"touch {self.name}",))


def test_a_pickle_with_foreign_names_is_refused_and_nothing_runs(tmp_path):
    saved(tmp_path / "d", {"w": torch.ones(2)})
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(AdapterError, match=r"posix.system|os.system"):
        open_dcp(tmp_path / "d")
    dotted = b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x04true\x85R."
    with pytest.raises(AdapterError, match="filesystem.os.system: refused"):
        pickles.read(dotted, "x")
    for module, name in (
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch", "os.system"),
    ):
        data = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
        with pytest.raises(AdapterError, match="refused"):
            pickles.read(data, "x", tensors=True)
    assert not (tmp_path / "ran").exists()


def _move(meta, **what):
    info = next(iter(meta.storage_data.values()))
    for name, value in what.items():
        setattr(info, name, value)


def _properties(meta):
    return meta.state_dict_metadata["w"].properties


HOSTILE = {
    "an item behind the end": (lambda m: _move(m, offset=10**9), "'w'.*behind the file"),
    "an item elsewhere": (lambda m: _move(m, relative_path="../w"), "'w' lies in"),
    "an item inside another": (lambda m: _move(m, offset=7), "'w'"),
    "a compressed item": (lambda m: _move(m, transform_descriptors=["zstd"]), "'w' is stored transformed"),
    "a missing chunk": (lambda m: m.state_dict_metadata["w"].chunks.pop(), "'w'.*missing, or overlap"),
    "a missing place": (lambda m: m.storage_data.pop(next(iter(m.storage_data))), "'w' at .* is in no file"),
    "overlap": (lambda m: setattr(m.state_dict_metadata["w"].chunks[2], "offsets", torch.Size([2, 0])), "'w'"),
    "another dtype of the width": (lambda m: setattr(_properties(m), "dtype", torch.int32), "'w'.*float32, expected"),
    "another dtype": (lambda m: setattr(_properties(m), "dtype", torch.float64), "'w'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_directory_that_lies_is_refused_by_name(tmp_path, what):
    edit, match = HOSTILE[what]
    path = chunked(tmp_path / "d", "w", torch.arange(36.0).view(6, 6), BOXES, edit)
    with pytest.raises(AdapterError, match=match):
        open_dcp(path)


def test_a_truncated_file_is_refused_and_nothing_written(hf, tmp_path):
    path, config, _ = hf("qwen3_moe alike")
    fmoe.convert(path, tmp_path / "there", to="torchtitan")
    file = tmp_path / "there" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="behind the file"):
        fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not (tmp_path / "back").exists()


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
