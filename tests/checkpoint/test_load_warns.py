"""What a load cannot vouch for is warned of once, where it is called; what is meant so is not."""

import json
import warnings

import hf_zoo as zoo
import pytest
import torch
from directories import load
from hf import save

import fmoe
import fmoe.dcp

LOST = {"mixtral": ".gate.weight", "qwen3_moe": "lm_head", "deepseek_v3": "lm_head"}
CALLS = {
    "load": lambda path: fmoe.load(path),
    "meta": lambda path: fmoe.load(path, "meta"),
    "read": lambda path: fmoe.load(path, mmap=False, dtype="float32", cast="all"),
    "experts": lambda path: fmoe.load(path, e=range(2)),
    "dcp": lambda path: fmoe.dcp.load(blank(path), path),
}


def blank(path):
    with warnings.catch_warnings(action="ignore"):
        return {n: torch.empty_like(t, device="cpu") for n, t in fmoe.load(path, "meta").items()}


def parted(path, name, edit, part=()):
    """A checkpoint of which a part is not there, and whose config is edited."""
    _, source = zoo.saved(name)
    tensors, config = load(source), json.loads((source / "config.json").read_text())
    edit(config)
    save(config, {n: t for n, t in tensors.items() if not any(p in n for p in part)}, path)
    return path


def unnamed(config):
    del config["architectures"]


def unknown(config):
    config["architectures"] = ["Mine"]


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory):
    """name -> (a directory, what its warning says)"""
    at = tmp_path_factory.mktemp("doubtful")
    made = {f"{n} unnamed": (parted(at / n, n, unnamed, [part]), part) for n, part in LOST.items()}
    made["unknown"] = parted(at / "mine", "mixtral", unknown), "names Mine in architectures"
    for name, (path, text) in [*made.items()]:
        fmoe.convert(path, at / f"{name} native", fsync=False)
        made[f"{name} native"] = at / f"{name} native", text
    return made


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [*(f"{n} unnamed{end}" for n in LOST for end in ("", " native")), "unknown"])
def test_what_may_be_lost_is_warned_of_once_where_the_call_stands(name, call, doubtful):
    path, text = doubtful[name]
    with warnings.catch_warnings(record=True, action="always") as found:
        CALLS[call](path)
    [one] = found
    assert one.category is fmoe.CheckpointWarning and one.filename == __file__ and text in str(one.message)
    assert all(told in fmoe.verify(path).notes for told in str(one.message).splitlines())


def test_what_is_meant_so_is_not_warned_of(tmp_path):
    """pytest makes errors of warnings."""
    whole = parted(tmp_path / "whole", "qwen3_moe", unnamed)
    text = parted(tmp_path / "text", "qwen3_vl_moe", lambda config: None, ["visual"])
    assert any("the text model alone" in note for note in fmoe.verify(text).notes)
    ahead = parted(tmp_path / "ahead", "deepseek_v3", lambda config: config.update(num_nextn_predict_layers=1))
    assert any("MTP is absent" in note for note in fmoe.verify(ahead).notes)
    fmoe.convert(whole, tmp_path / "some", e=range(1, 3), fsync=False)
    blocks = parted(tmp_path / "blocks", "qwen3_moe", unnamed, ["attn", "norm", "embed", "lm_head"])
    for path in (whole, text, ahead, tmp_path / "some", blocks):
        for call in CALLS:
            if (path.name, call) != ("some", "experts"):
                CALLS[call](path)
    headless = parted(tmp_path / "dropped", "qwen3_moe", unnamed, ["lm_head"])
    assert fmoe.load(headless, adapter=fmoe.drop("model.norm.weight", because="a test") | fmoe.keep("{rest}"))


def test_a_native_range_is_cast_as_the_same_range_of_its_source_is(tmp_path):
    _, source = zoo.saved("qwen3_moe")
    fmoe.convert(source, tmp_path, e=range(1, 3), fsync=False)
    how = dict(dtype="bfloat16", cast="all")
    found, expected = fmoe.load(tmp_path, **how), fmoe.load(source, e=range(1, 3), **how)
    assert found.keys() == expected.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
