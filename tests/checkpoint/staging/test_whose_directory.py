"""Whose a directory is decides what `force` replaces: an adapter's an adapter, a model's a model, by whatever call."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from directories import files

import fmoe
import fmoe.dcp
import fmoe.docs
from fmoe import AdapterError

EXAMPLE = Path(fmoe.docs.example())
PARAMS, ADAPTER = fmoe.load(EXAMPLE), fmoe.adapter(EXAMPLE)
LORA = fmoe.lora.init({n: t for n, t in PARAMS.items() if n.endswith("layers.0.mlp.experts.down_projs")}, r=2)
SAVES = {"save": fmoe.save, "dcp.save": fmoe.dcp.save}
WRITES = SAVES | {"convert": lambda params, path, adapter, **how: fmoe.convert(EXAMPLE, path, **how)}


def put(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["hf", "native", "pytorch_model.bin"])
def test_an_adapter_is_not_saved_into_a_models_own_directory(kind, force, tmp_path):
    path = tmp_path / "model"
    if kind == "native":
        fmoe.convert(EXAMPLE, path, fsync=False)
    elif kind == "hf":
        shutil.copytree(EXAMPLE, path)
    else:
        put(path, "config.json", kind)
    before = files(path)
    with pytest.raises(AdapterError, match=r"model is a model's own directory: found 'config.json'.*Fix: a directory"):
        fmoe.lora.save(LORA, path, ADAPTER, force=force)
    assert files(path) == before


def test_an_adapter_is_saved_beside_what_is_no_model_and_where_an_adapter_is(tmp_path):
    one = put(tmp_path / "one", "config.json", "optimizer.pt", "training_args.bin", "tokenizer.json")
    two = put(tmp_path / "two", "adapter_config.json", "config.json", "model.safetensors")
    fmoe.lora.save(LORA, one, ADAPTER)
    with pytest.raises(AdapterError, match="adapter_config.json is there already: pass force=True"):
        fmoe.lora.save(LORA, two, ADAPTER)
    fmoe.lora.save(LORA, two, ADAPTER, force=True)
    assert all(fmoe.lora.load(path, ADAPTER).params.keys() for path in (one, two))


@pytest.mark.parametrize("old", ["adapter_model.bin", "automodel_peft_config.json"])
def test_an_adapter_that_is_replaced_leaves_nothing_that_is_read_with_the_new_one(old, tmp_path):
    put(tmp_path, old, "README.md")
    with pytest.raises(AdapterError, match=f"{old} is there already: pass force=True"):
        fmoe.lora.save(LORA, tmp_path, ADAPTER)
    fmoe.lora.save(LORA, tmp_path, ADAPTER, force=True)
    assert files(tmp_path).keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


CONFIG = {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 4, "moe_intermediate_size": 3, "vocab_size": 5}
EXPERTS = {"gate_and_up_projs": torch.ones(3, 4, 6), "down_projs": torch.ones(3, 3, 4)}
BESIDE = ("README.md", "chat_template.jinja", "modeling_x.py", "tokenizer.json")
OTHERS = {"its own": {}, "other sizes": {"vocab_size": 7}, "dense": {"model_type": "llama"}, "no config": None}


@pytest.mark.parametrize("whose", OTHERS)
@pytest.mark.parametrize("call", SAVES)
def test_saving_over_another_models_directory_names_what_stays_of_it(call, whose, tmp_path):
    path, other = put(tmp_path / "model", *BESIDE, "model-00001-of-00001.safetensors"), OTHERS[whose]
    if other is not None:
        (path / "config.json").write_text(json.dumps(CONFIG | other))
    params = {f"model.layers.0.mlp.experts.{n}": t for n, t in EXPERTS.items()}
    notes = SAVES[call](params, path, fmoe.adapter("qwen3_moe", CONFIG), force=True, fsync=False).notes
    stays = [n for n in ("README.md", "chat_template.jinja", "config.json", *BESIDE[2:]) if n in BESIDE or other]
    left = [f"left as it was: {', '.join(map(repr, stays))}"] * (whose != "its own")
    gone = "of the former model, removed: 'model-00001-of-00001.safetensors'"
    dense = [n for n in notes if "has model_type 'llama', expected 'qwen3_moe'" in n]
    assert [n for n in notes if n not in dense][-1 - len(left) :] == [gone, *left] and len(dense) == (whose == "dense")
    assert files(path).keys() == {*BESIDE, "config.json", "model.safetensors"}


@pytest.mark.parametrize("there", [
    ("adapter_config.json", "adapter_model.bin"), ("adapter_config.json",), ("config.json", "pytorch_model.bin"),
    ("tokenizer.json",), ("model.gguf",), ("cat.jpg",)])  # fmt: skip
def test_what_force_may_replace_is_the_same_for_both_calls(there, tmp_path):
    """`save` alone goes into a directory that holds no checkpoint: what lies there is the model's to be."""
    said = {}
    for name, write in WRITES.items():
        for force in (False, True):
            path = put(tmp_path / f"{name}{force}", *there)
            if name != "convert":
                (path / "config.json").unlink(missing_ok=True)
            try:
                write(PARAMS, path, ADAPTER, force=force, fsync=False)
                kept = {n for n in there if n in files(path) and files(path)[n] == b"{}"} - {"config.json"}
                said[name, force] = tuple(sorted(kept))
            except AdapterError as error:
                said[name, force] = "not empty" if "is not empty" in str(error) else "no checkpoint"
    held = there[-1] not in ("tokenizer.json", "cat.jpg")
    for name in WRITES:
        first = "not empty" if held or name == "convert" else there
        assert said[name, False] == first
        assert said[name, True] == (() if held else "no checkpoint" if name == "convert" else there), name
