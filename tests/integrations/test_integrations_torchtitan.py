"""L1: adapters in torchtitan's shape, called as its loader calls them."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loader_cases import blank, saved
from safetensors.torch import save_file

import fmoe
from fmoe.integrations import torchtitan
from fmoe.testing import same


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        yield


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text", "gpt_oss", "granitemoe"])
def test_L1_torchtitans_loader_round_trips(name: str, tmp_path: Path) -> None:
    _, tensors = saved(name, tmp_path)
    adapter = torchtitan.StateDictAdapter(object(), tmp_path)
    native = fmoe.adapter(tmp_path).from_hf(tensors)
    model = blank(native)
    destinations = adapter.to_hf(model)
    dcp.load(destinations, storage_reader=adapter.get_hf_storage_reader(str(tmp_path)))
    same(model, native)  # through views: before from_hf is called
    same(adapter.from_hf(destinations), native)
    index = tmp_path / "model.safetensors.index.json"
    mapping = adapter.fqn_to_index_mapping
    if not index.exists():
        assert mapping is None
    else:
        files = json.loads(index.read_text())["weight_map"]
        assert mapping is not None and mapping.keys() == tensors.keys() == files.keys()
        assert all(f"-{mapping[n]:05d}-of-" in file for n, file in files.items())
        assert set(mapping.values()) == set(range(1, len(set(files.values())) + 1))


def test_L1_torchtitans_own_names(tmp_path: Path) -> None:
    _, tensors = saved("qwen3_moe", tmp_path)
    adapter = torchtitan.StateDictAdapter(None, tmp_path, names=torchtitan.W123)
    titan = adapter.from_hf(tensors)
    layer = "model.layers.0.mlp.experts"
    for e in range(8):
        for w, proj in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            assert torch.equal(titan[f"layers.0.moe.experts.{w}"][e], tensors[f"{layer}.{e}.{proj}_proj.weight"])
    same(adapter.to_hf(titan), tensors)
    before = dict(titan)
    assert adapter.to_hf(titan) is not titan and titan.keys() == before.keys()
    model = blank(titan)
    destinations = adapter.to_hf(model)
    dcp.load(destinations, storage_reader=adapter.get_hf_storage_reader(str(tmp_path)))
    same(adapter.from_hf(destinations), titan)


def test_L1_torchtitans_reader_of_quantised_files_decodes(tmp_path: Path) -> None:
    codes = torch.randn(128, 256).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 0.5]])
    save_file({"w.weight": codes, "w.weight_scale_inv": scale}, tmp_path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(("w.weight", "w.weight_scale_inv"), "model-00001-of-00001.safetensors")
    (tmp_path / torchtitan.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    adapter = torchtitan.StateDictAdapter(None, tmp_path, adapter=fmoe.keep("{rest}"))
    found = {"w.weight": torch.zeros(128, 256)}
    dcp.load(found, storage_reader=adapter.get_hf_storage_reader(str(tmp_path), from_quantized=True))
    assert torch.equal(found["w.weight"], codes.float() * scale.repeat_interleave(128, 1))


def test_L1_torchtitans_errors(tmp_path: Path) -> None:
    with pytest.raises(fmoe.AdapterError, match="which family"):
        torchtitan.StateDictAdapter()
    with pytest.raises(fmoe.AdapterError, match="config.json"):
        torchtitan.StateDictAdapter(None, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / torchtitan.INDEX).write_text('{"weight_map": {"a": "odd.safetensors"}}')
    with pytest.raises(fmoe.AdapterError, match="'a' lies in 'odd.safetensors'"):
        torchtitan.StateDictAdapter(None, tmp_path)
