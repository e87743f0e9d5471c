"""Whatever is wrong with a system's directory is refused by name, and nothing is written: every system, every kind."""

import json
import os
import re
import shutil

import hf_zoo as zoo
import pytest
import torch
from gguf_writer import write
from safetensors.torch import save_file
from systems_zoo import model

import fmoe.dcp
import fmoe.draw
from fmoe import AdapterError
from fmoe.families import family
from fmoe.systems import SYSTEMS

MODELS = ("qwen3_moe alike", "deepseek_v3", "gpt_oss")
SIDE = {"sglang": "vllm"}  # whose names of this model are the same
WEIGHTS = (".safetensors", ".distcp", ".gguf")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """system -> its directory of the first model that it knows, written by us, and that model's name."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def of(name):
        if name not in made:
            kind = next(m for m in MODELS if SYSTEMS[name].knows(m.split()[0]))
            config, tensors = model(kind)
            (hf := folder / f"{name} hf").mkdir()
            save_file({n: t.contiguous() for n, t in tensors.items()}, hf / "model.safetensors", {"format": "pt"})
            (hf / "config.json").write_text(json.dumps(config, default=str))
            how = {"max_shard_size": "50KB", "fsync": False}
            if name == "gguf":
                theirs = fmoe.adapter(config["model_type"], config, system=name).from_hf(tensors)
                how["like"] = write(folder / "like.gguf", theirs)
            fmoe.convert(hf, folder / name, to=name, **how)
            made[name] = kind
        return folder / name, made[name]

    return of


def weights(path):
    """The files that hold tensors, the largest first."""
    found = [p for p in path.rglob("*") if p.is_file() and (p.suffix in WEIGHTS or p.parent.name.startswith("params."))]
    return sorted((p for p in found if p.name != ".zarray"), key=lambda p: (-p.stat().st_size, p.name))


def other_sizes(path):
    said = json.loads((path / "config.json").read_text())
    for field in ("hidden_size", "num_attention_heads", "vocab_size"):
        said[field] *= 2
    (path / "config.json").write_text(json.dumps(said))


def layers(path):
    said = json.loads((path / "config.json").read_text())
    said["num_hidden_layers"] += 1
    said |= {"layer_types": [*said["layer_types"], said["layer_types"][0]]} if said.get("layer_types") else {}
    (path / "config.json").write_text(json.dumps(said))


def another(path):
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "model_type": "llama"}))


SHORT = "cut short|cannot be read|behind the file"
WRONG = {
    "a file cut short": (lambda path: os.truncate(weights(path)[0], weights(path)[0].stat().st_size - 100), SHORT),
    "a file of nothing": (lambda path: os.truncate(weights(path)[0], 0), SHORT),
    "a file gone": (lambda path: weights(path)[0].unlink(), "is not there|lacks the chunks|holds no tensors"),
    "no config": (lambda path: (path / "config.json").unlink(), "no Hugging Face config.*--config DIR_OR_JSON"),
    "a config of other sizes": (other_sizes, "expected"),
    "a config of more layers": (layers, r"'model.layers.\d' has no experts|expected \[4, "),
    "a config of no such family": (another, "'llama' is unknown"),
    "a config that is none": (lambda path: (path / "config.json").write_text("[]"), "a list, expected an object"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_wrong_is_refused_by_name_and_nothing_is_written(directory, tmp_path, system, what):
    path, _ = directory(system)
    shutil.copytree(path, tmp_path / "there")
    wrong, match = WRONG[what]
    wrong(tmp_path / "there")
    with pytest.raises(AdapterError, match=match):
        fmoe.convert(tmp_path / "there", tmp_path / "out", to="hf", from_=system)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_directory_of_one_system_is_not_read_as_anothers(directory, tmp_path, system):
    path, kind = directory(system)
    for other in SYSTEMS:
        if other == system or not SYSTEMS[other].knows(kind.split()[0]):
            continue
        try:
            fmoe.convert(path, tmp_path / other, to="hf", from_=other, dry_run=True)
        except AdapterError:
            assert not (tmp_path / other).exists()
        else:  # of some families two systems have the very same names
            theirs = [fmoe.adapter(kind.split()[0], model(kind)[0], system=s) for s in (system, other)]
            assert theirs[0].plan(model_specs(kind)).targets == theirs[1].plan(model_specs(kind)).targets


READERS = {
    "adapter": (lambda path: fmoe.adapter(path), "open"),
    "adapter of a system": (lambda path: fmoe.adapter(path, system="vllm"), "open"),
    "load": (lambda path: fmoe.load(path), "load"),
    "dcp.load": (lambda path: fmoe.dcp.load({}, path), "load"),
    "draw": (lambda path: fmoe.draw.checkpoint(path), "draw"),
    "lora.load": (lambda path: fmoe.lora.load(adapted(path.parent / f"{path.name} lora"), path), "open"),
}


def adapted(path):
    params = {"model.layers.0.mlp.experts.down_projs": torch.ones(8, 24, 32)}
    base = fmoe.adapter("qwen3_moe", model("qwen3_moe alike")[0])
    fmoe.lora.save(fmoe.lora.init(params, r=2), path, base, lora_alpha=2, force=True)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_whoever_reads_ours_alone_says_whose_it_is_and_to_convert_it(directory, system, reader):
    read, verb = READERS[reader]
    path, _ = directory(system)
    fix = rf"Fix: fmoe convert {re.escape(str(path))} HF --to hf, then {verb} that"
    with pytest.raises(
        AdapterError, match=rf"^{re.escape(str(path))} is {SIDE.get(system, system)}'s(, as is told by .*)?\. {fix}"
    ) as error:
        read(path)
    if SYSTEMS[system].container == "safetensors":
        assert f"'s, as is told by {error.value.keys[0]!r}" in str(error.value), "it names the tensors that show it"


@pytest.mark.parametrize("kind", ["gemma4_text", "minimax_m3_vl_text"])
def test_what_automodel_holds_in_other_numbers_or_names_is_not_read_as_ours(tmp_path, kind):
    fmoe.convert(zoo.saved(kind)[1], tmp_path / "there", "automodel", fsync=False)
    for read, verb in READERS.values():
        with pytest.raises(AdapterError, match=f"there is automodel's, as is told by '.*'.* Fix: .*then {verb} that"):
            read(tmp_path / "there")
    assert fmoe.inspect(tmp_path / "there")["format"] == "automodel"
    assert fmoe.verify(tmp_path / "there").tensors


def model_specs(kind):
    return {n: fmoe.TensorSpec(tuple(t.shape), t.dtype) for n, t in model(kind)[1].items()}


@pytest.mark.parametrize("name", [n for n in SYSTEMS if SYSTEMS[n].container in ("memory", "safetensors")])
def test_safetensors_without_a_config_are_told_by_their_names_and_what_is_said_to_do_works(name, directory, tmp_path):
    whole, kind = directory(name)
    shutil.copytree(whole, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    for call in (fmoe.inspect, fmoe.verify, fmoe.load, fmoe.adapter, lambda p: fmoe.convert(p, tmp_path / "new")):
        with pytest.raises(AdapterError, match=r"config.json is missing, and the tensors are (\w+)'s") as error:
            call(tmp_path / "bare")
        said = re.search(r"--from (\w+) --config", str(error.value))[1]
        assert said in (name, SIDE.get(name)), error.value
    done = fmoe.convert(tmp_path / "bare", tmp_path / "new", "hf", from_=said, config=whole, fsync=False)
    assert done.made


TABLES = [(name, kind) for name, s in SYSTEMS.items() if not s.native for kind in (*s.tables, "granitemoehybrid")]


@pytest.mark.parametrize(("name", "kind"), TABLES)
def test_a_model_of_no_experts_is_refused_in_words(name, kind):
    count = family(kind).fields["n_routed_experts"].split()[0]
    config = {"model_type": kind, count: 0, "num_hidden_layers": 2, "hidden_size": 4}
    text = (
        f"^{kind} with {count} 0 has no experts, and {name}'s tables are of models with some. Fix: to 'hf' or 'native'"
    )
    with pytest.raises(AdapterError, match=text):
        fmoe.adapter(kind, config, system=name)
