"""A directory of PEFT's is no model: whoever opens one says what it is and who reads it, and none beside a model is."""

import shutil
from pathlib import Path

import pytest
import torch

import fmoe.dcp
import fmoe.docs
import fmoe.draw
from fmoe import AdapterError
from fmoe.checkpoint.diff import diff

CALLS = {
    "adapter": lambda path, out: fmoe.adapter(path),
    "load": lambda path, out: fmoe.load(path),
    "load by own rules": lambda path, out: fmoe.load(path, adapter=fmoe.keep("{rest}")),
    "inspect": lambda path, out: fmoe.inspect(path),
    "inspect with a config": lambda path, out: fmoe.inspect(path, config=fmoe.docs.example()),
    "verify": lambda path, out: fmoe.verify(path),
    "verify as a system's": lambda path, out: fmoe.verify(path, from_="vllm"),
    "convert": lambda path, out: fmoe.convert(path, out),
    "convert to hf": lambda path, out: fmoe.convert(path, out, to="hf", dtype="bfloat16"),
    "convert with a config": lambda path, out: fmoe.convert(path, out, to="hf", config=fmoe.docs.example()),
    "convert to a system": lambda path, out: fmoe.convert(path, out, to="vllm"),
    "convert from a system": lambda path, out: fmoe.convert(path, out, to="hf", from_="vllm"),
    "diff": lambda path, out: list(diff(path, fmoe.docs.example())),
    "draw": lambda path, out: fmoe.draw.checkpoint(path),
    "dcp.load": lambda path, out: fmoe.dcp.load({}, path),
    "lora.load on it": lambda path, out: fmoe.lora.load(path, path),
}
KINDS = ("as PEFT writes it", "with a config.json", "with a trainer's files", "in a pickle")


def adapter(path, kind):
    base = Path(fmoe.docs.example())
    fmoe.lora.save(fmoe.lora.init(fmoe.load(base), r=2), path, fmoe.adapter(base), lora_alpha=4, base=str(base))
    if kind == "with a config.json":
        shutil.copy(base / "config.json", path)
    if kind == "with a trainer's files":
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "tokenizer.json"):
            (path / name).write_bytes(b"{}")
    if kind == "in a pickle":
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_whoever_opens_an_adapter_says_that_it_is_one_and_who_reads_it(tmp_path, call, kind):
    path = adapter(tmp_path / "lora", kind)
    fix = r"Fix: fmoe\.lora\.load\('.*lora', BASE\) reads it, and fmoe\.lora\.merge"
    with pytest.raises(AdapterError, match=rf"lora is a LoRA adapter, .*expected a model\. {fix}"):
        CALLS[call](path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_names_reads_it_and_says_of_a_pickle_that_it_is_one(tmp_path, kind):
    path = adapter(tmp_path / "lora", kind)
    if kind == "in a pickle":
        with pytest.raises(
            AdapterError, match=r"adapter_model.safetensors is not there, but 'adapter_model.bin': a pi"
        ):
            fmoe.lora.load(path, fmoe.docs.example())
        return
    tuned = fmoe.lora.load(path, fmoe.docs.example())
    native = fmoe.load(fmoe.docs.example())
    assert fmoe.lora.merge(native, tuned.params, tuned.scales).keys() == native.keys()


def test_a_model_beside_which_an_adapter_lies_is_a_model(tmp_path):
    path = adapter(tmp_path / "lora", KINDS[0])
    shutil.copytree(fmoe.docs.example(), path, dirs_exist_ok=True)
    assert fmoe.load(path).keys() == fmoe.load(fmoe.docs.example()).keys()
    assert fmoe.inspect(path)["problems"] == []
    fmoe.convert(path, tmp_path / "native")
    assert all(torch.equal(t, fmoe.load(path)[n]) for n, t in fmoe.load(tmp_path / "native").items())
