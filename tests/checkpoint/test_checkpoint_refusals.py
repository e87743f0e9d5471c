"""What does not convert is refused before a byte is written."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import INDEX, files, fill
from safetensors.torch import load_file, save_file

import fmoe
from fmoe import AdapterError

ONE, TWO = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"
Change = Callable[[Path], object]


@pytest.fixture
def source(tmp_path) -> Path:
    return fill(tmp_path / "source", "qwen3_moe-float32")


def text(name: str, content: str | bytes) -> Change:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def update(name: str, **fields: Any) -> Change:
    """Fields of a JSON file changed; None takes one away."""

    def change(path: Path) -> None:
        found = json.loads((path / name).read_text()) | fields
        (path / name).write_text(json.dumps({n: v for n, v in found.items() if v is not None}))

    return change


def weight_map(change: Callable[[dict[str, Any]], object]) -> Change:
    def at(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return at


def listed(file: str) -> Change:
    return weight_map(lambda names: names.update({EXPERT: file}))


def dangling(path: Path) -> None:
    (path / ONE).unlink()
    (path / ONE).symlink_to("y")


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = ONE) -> Change:
    """The tensors of one file changed; what is taken away leaves the index too."""

    def at(path: Path) -> None:
        found = load_file(path / file)
        before = set(found)
        change(found)
        save_file(found, path / file, {"format": "pt"})
        weight_map(lambda names: [names.pop(n) for n in before - found.keys()])(path)

    return at


def cut(size: int, path: Path) -> None:
    (path / ONE).write_bytes((path / ONE).read_bytes()[:size])


def no_weights(path: Path) -> None:
    for file in [INDEX, *(p.name for p in path.glob("*.safetensors"))]:
        (path / file).unlink()


def an_adapter(path):
    for file in path.iterdir():
        file.unlink()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"")


REFUSED: dict[str, tuple[Change, str]] = {
    "a LoRA adapter alone": (an_adapter, r"is a LoRA adapter, .*expected a model\. Fix: fmoe\.lora\.load\("),
    "a file that is not there": (lambda path: (path / TWO).unlink(), f"{TWO} is not there, and {INDEX} names it"),
    "a link to nowhere": (dangling, f"{ONE} is not there"),
    "a file outside": (listed(f"../source/{ONE}"), f"'../source/{ONE}'"),
    "a folder above": (listed(".."), "'..'"),
    "a file by its whole path": (listed("/etc/passwd"), "'/etc/passwd'"),
    "a file that never was": (listed("x.safetensors"), "x.safetensors is not there, and"),
    "a header cut short": (partial(cut, 100), f"{ONE} has 100 bytes, and its header would have .* cut short"),
    "data cut short": (partial(cut, -1), f"{ONE} has [0-9,]+ bytes, its header says [0-9,]+"),
    "an empty file": (partial(cut, 0), f"{ONE} has 0 bytes|{ONE} has no safetensors header"),
    "a header of garbage": (text(ONE, b"\x10" + bytes(7) + b"{" * 16), f"{ONE} has no safetensors header: JSON"),
    "a huge header": (text(ONE, b"\xff" * 8 + b"{}"), f"{ONE} has 10 bytes, and its header would have 18,446,"),
    "a Git LFS pointer": (text(ONE, "version https://git-lfs.github.com/spec/v1\n"), f"{ONE} has 43 bytes.* Git LFS"),
    "a key in two files": (
        tensors(lambda t: t.update({EXPERT: torch.ones(1)}), TWO),
        f"{EXPERT}'.*{ONE}.*{TWO}",
    ),
    "a key that the index lacks": (weight_map(lambda names: names.pop(EXPERT)), f"disagree .*'{EXPERT}'"),
    "a key that the files lack": (weight_map(lambda names: names.update({"x.y": ONE})), f"{INDEX}.* disagree .*'x.y'"),
    "a key in another file": (listed(TWO), f"disagree .*'{EXPERT}'"),
    "an index that is no JSON": (text(INDEX, "{"), f"{INDEX} is no JSON"),
    "an index that is a list": (text(INDEX, "[]"), f"{INDEX} holds a list"),
    "an index without weights": (update(INDEX, weight_map=None), f"{INDEX} has no weight_map"),
    "an index of lists": (update(INDEX, weight_map={EXPERT: [ONE]}), f"{INDEX} has no weight_map of names to files"),
    "an empty index": (update(INDEX, weight_map={}), "source holds no tensors"),
    "no weights": (no_weights, "source holds no tensors in safetensors files"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json is missing"),
    "a config that is no JSON": (text("config.json", "model_type: qwen3_moe"), "config.json is no JSON"),
    "a config that is no text": (text("config.json", b"\xff\xfe\x00"), "config.json is no JSON"),
    "a config without end": (text("config.json", "[" * 100_000), "config.json is no JSON"),
    "a config that is a list": (text("config.json", "[]"), "config.json holds a list, expected an object"),
    "no model type": (update("config.json", model_type=None), "config.json has no model_type"),
    "an unknown model type": (
        update("config.json", model_type="gpt9"),
        "'gpt9' is unknown. Fix: adapter= .*; known ones: fmoe families$",
    ),
    "a missing expert": (tensors(lambda t: t.pop(EXPERT)), f"missing .*'{EXPERT}'"),
    "an expert of another shape": (tensors(lambda t: t.update({EXPERT: torch.ones(3, 3)})), EXPERT),
    "an expert of another dtype": (tensors(lambda t: t.update({EXPERT: t[EXPERT].half()})), EXPERT),
    "more experts than config says": (
        update("config.json", num_experts=7, num_local_experts=7),
        "layers.0.mlp.experts.7.gate_proj.weight",
    ),
    "fewer experts than config says": (
        update("config.json", num_experts=9, num_local_experts=9),
        "layers.0.mlp.experts.8.gate_proj.weight",
    ),
    "a size in words": (
        update("config.json", num_experts="eight"),
        r'config.json has num_experts "eight", .* an integer\. ',
    ),
    "a dtype that is none": (update("config.json", dtype="float99"), "config.json: dtype is 'float99'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_directory_is_refused_with_its_name(name, source, tmp_path):
    change, match = REFUSED[name]
    change(source)
    before = files(source)
    for job in (lambda: fmoe.convert(source, tmp_path / "out"), lambda: fmoe.verify(source)):
        with pytest.raises(AdapterError, match=match):
            job()
    assert not (tmp_path / "out").exists() and files(source) == before


def test_inspect_lists_what_keeps_a_directory_from_converting(source):
    tensors(lambda t: t.pop(EXPERT))(source)
    found = fmoe.inspect(source)
    assert len(found["problems"]) == 1 and EXPERT in found["problems"][0]
    assert (found["tensors"], found["experts"], found["model_type"]) == (79, None, "qwen3_moe")
    update("config.json", model_type="gpt9")(source)
    assert "'gpt9' is unknown" in fmoe.inspect(source)["problems"][0]


def test_inspect_notes_files_that_the_index_leaves_out(source):
    shutil.copy(source / ONE, source / "consolidated.safetensors")
    found = fmoe.inspect(source)
    assert found["notes"] == ["not in the index, so not read: 'consolidated.safetensors'"]
    assert found["problems"] == [] and (found["tensors"], found["files"]) == (80, 3)


def test_the_source_may_be_a_path_in_any_form(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fmoe.convert("source/", "new/out/")
    assert fmoe.verify(Path("./new/out")).tensors == 36
    for path, match in [("nowhere", "nowhere is not there"), ("source/config.json", "config.json is no directory")]:
        with pytest.raises(AdapterError, match=match):
            fmoe.convert(path, "other")
