"""A model in shards over one in more, in fewer, or in one file: every byte, the index, and nothing of the former."""

import json
import shutil
from itertools import permutations

import hf_zoo as zoo
import pytest
import torch
import transformers
from directories import load
from safetensors import safe_open

import fmoe
import fmoe.dcp

INDEX = "model.safetensors.index.json"
SIZES = ("30KB", "60KB", "5GB")
CALLS = {"save": fmoe.save, "dcp": fmoe.dcp.save}
STALE = {
    "a shard that no index names": "model-00009-of-00009.safetensors",
    "pickled weights": "pytorch_model.bin",
    "an index of pickled shards": "pytorch_model.bin.index.json",
    "what is consolidated": "consolidated.safetensors",
    "an index of another file": INDEX,
}


def config_alone(path):
    path.mkdir()
    for file in zoo.saved("qwen3_moe")[1].iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, path)
    return path


def check(path, expected):
    """The files hold these tensors and no others, as the index says; Transformers reads them; returns their names."""
    where, found = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            assert where.keys().isdisjoint(tensors.keys())
            where |= dict.fromkeys(tensors.keys(), file.name)
            found |= {n: tensors.get_tensor(n) for n in tensors.keys()}  # noqa: SIM118
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    files = [*dict.fromkeys(where.values())]
    one = ["model.safetensors"]
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] or files == one
    assert (path / INDEX).exists() == (files != one)
    if files != one:
        index = json.loads((path / INDEX).read_text())
        assert index["weight_map"] == where
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert not [p for p in path.iterdir() if p.name.endswith(".part") or p.name.startswith(".") or ".bin" in p.name]
    model, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")) and model
    return files


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("first", "then"), [*permutations(SIZES, 2), ("60KB", "60KB")])
def test_a_model_replaces_one_in_other_shards(first, then, call, tmp_path):
    _, source = zoo.saved("qwen3_moe")
    adapter, native = fmoe.adapter(source), fmoe.load(source)
    other = {n: t + 1 for n, t in native.items()}
    path, old, new = config_alone(tmp_path / "model"), load(source), adapter.to_hf(other)
    CALLS[call](native, path, adapter, max_shard_size=first, fsync=False)
    before = check(path, old)
    with pytest.raises(fmoe.AdapterError, match="force=True"):
        CALLS[call](other, path, adapter, max_shard_size=then, fsync=False)
    assert check(path, old) == before
    CALLS[call](other, path, adapter, max_shard_size=then, force=True, fsync=False)
    assert len(check(path, new)) == len(before) if first == then else check(path, new) != before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("size", ["60KB", "5GB"])
@pytest.mark.parametrize("what", STALE)
def test_nothing_of_the_former_model_stays_that_one_would_read(what, size, call, tmp_path):
    _, source = zoo.saved("qwen3_moe")
    path = config_alone(tmp_path / "model")
    (path / STALE[what]).write_text(json.dumps({"weight_map": {"a": "b.bin"}}))
    CALLS[call](fmoe.load(source), path, fmoe.adapter(source), max_shard_size=size, force=True, fsync=False)
    check(path, load(source))


@pytest.mark.parametrize("size", ["2KB", "30KB", "5GB"])
def test_shards_of_any_size_come_back_byte_for_byte(size, tmp_path):
    model, source = zoo.saved("qwen3_moe")
    model.save_pretrained(tmp_path / "hf", max_shard_size=size)
    fmoe.convert(tmp_path / "hf", tmp_path / "native", max_shard_size="10KB", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", max_shard_size="70KB", fsync=False)
    read = lambda path: {p.name: p.read_bytes() for p in path.iterdir() if p.name.startswith("model")}
    assert read(tmp_path / "back") == read(tmp_path / "hf")
    check(tmp_path / "back", load(source))
