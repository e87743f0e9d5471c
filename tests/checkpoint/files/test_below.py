"""Shards in folders that the index names, as Transformers reads them: read, converted and back, and replaced whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from directories import files
from hf import write
from servers import serving
from transformers import AutoModelForCausalLM

import fmoe
from fmoe.checkpoint.files.directory import open_checkpoint
from fmoe.testing import same

INDEX = "model.safetensors.index.json"
WAYS: dict[str, Callable[[str, int], str]] = {
    "in a folder": lambda file, i: f"sub/{file}",
    "deeper": lambda file, i: f"a/b/c/{file}",
    "some of them": lambda file, i: f"sub/{file}" if i else file,
    "one folder each": lambda file, i: f"{i}/model.safetensors",
    "folders alike in others": lambda file, i: f"{i}/shards/model.safetensors",
    "with a dot": lambda file, i: f"./{file}",
    "with two slashes": lambda file, i: f"sub//./{file}",
    "in a hidden folder": lambda file, i: f".weights/{file}",
}
EVERY = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flat") / "hf"
    write("qwen3_moe", path, dtype=torch.bfloat16, max_shard_size=60_000)
    assert len([*path.glob("*.safetensors")]) > 2
    return path


def below(flat: Path, path: Path, way: str) -> Path:
    """The same checkpoint, its shards where a way says."""
    shutil.copytree(flat, path)
    index = json.loads((path / INDEX).read_text())
    named = {file: WAYS[way](file, i) for i, file in enumerate(sorted({*index["weight_map"].values()}))}
    for file, other in named.items():
        (path / other).parent.mkdir(parents=True, exist_ok=True)
        (path / file).rename(path / other)
    index["weight_map"] = {n: named[file] for n, file in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))
    return path


def runs(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict())


@EVERY
def test_what_transformers_reads_is_read_and_comes_back_file_by_file(way, flat, tmp_path):
    source = below(flat, tmp_path / "hf", way)
    same(runs(source), runs(flat))
    for how in ({}, {"mmap": False}, {"e": range(2, 4)}):
        same(fmoe.load(source, **how), fmoe.load(flat, **how))
    strip = lambda found: {n: v for n, v in found.items() if n not in ("path", "bytes_on_disk")}
    assert strip(fmoe.inspect(source)) == strip(fmoe.inspect(flat))
    assert fmoe.verify(source).notes == fmoe.verify(flat).notes
    report = fmoe.convert(source, tmp_path / "native", checksums=True, fsync=False)
    assert not any("not taken along" in note for note in report.notes)
    assert not [p for p in (tmp_path / "native").iterdir() if p.is_dir()]
    same(fmoe.load(tmp_path / "native"), fmoe.load(flat))
    fmoe.verify(tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    assert files(tmp_path / "back") == files(source)
    fmoe.convert(source, tmp_path / "other", "hf", dtype="float32", fsync=False)
    assert not [p for p in (tmp_path / "other").iterdir() if p.is_dir()]
    same(fmoe.load(tmp_path / "other"), fmoe.load(flat, dtype="float32"))


@EVERY
def test_what_lies_beside_shards_goes_along_or_is_named(way, flat, tmp_path):
    source = below(flat, tmp_path / "hf", way)
    shard = source / max(json.loads((source / INDEX).read_text())["weight_map"].values(), key=len)
    for name in ("notes.txt", "more/of/them.txt"):
        (shard.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (shard.parent / name).write_text("mine")
    report = fmoe.convert(source, tmp_path / "native", fsync=False)
    mine = [(shard.parent / n).resolve().relative_to(source).as_posix() for n in ("notes.txt", "more/of/them.txt")]
    told = " ".join(n for n in report.notes if "not taken along" in n)
    there = [(tmp_path / "native" / n).exists() for n in mine]
    assert there == [way != "in a hidden folder"] * 2 if there[0] else f"'{mine[0]}'" in told and "more'" in told


@EVERY
def test_such_a_model_is_replaced_whole(way, flat, tmp_path):
    for name, write_ in {
        "converted": lambda path: fmoe.convert(flat, path, dtype="float32", force=True, fsync=False),
        "back": lambda path: fmoe.convert(flat, path, "hf", dtype="float32", force=True, fsync=False),
        "saved": lambda path: fmoe.save(fmoe.load(flat), path, fmoe.adapter(flat), force=True, fsync=False),
    }.items():
        path = below(flat, tmp_path / name, way)
        (path / "mine").mkdir()
        (path / "mine" / "photo.safetensors").write_text("not the model's")
        index = {*json.loads((path / INDEX).read_text())["weight_map"].values()}
        report = write_(path)
        now = {p.as_posix() for p in map(lambda n: Path(n), files(path)) if p.suffix == ".safetensors"}
        opened = open_checkpoint(path)
        assert now == {*opened.files.values(), "mine/photo.safetensors"}, name
        gone = {Path(n).as_posix() for n in index} - now
        assert all(any(n in note for note in report.notes) for n in gone)
        assert not [p for p in path.rglob("*") if p.is_dir() and p.name != "mine"]


def test_by_address_and_through_a_cache_of_links(flat, tmp_path):
    source = below(flat, tmp_path / "hf", "one folder each")
    with serving(source) as server:
        same(fmoe.load(server.url), fmoe.load(flat))
        fmoe.convert(server.url, tmp_path / "native", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    same(fmoe.load(tmp_path / "back"), fmoe.load(flat))
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    for i, file in enumerate(files(source)):
        link = cache / "snapshots" / "0a1b" / file
        link.parent.mkdir(parents=True, exist_ok=True)
        (cache / "blobs" / str(i)).write_bytes((source / file).read_bytes())
        link.symlink_to("../" * file.count("/") + f"../../blobs/{i}")
    same(runs(link := cache / "snapshots" / "0a1b"), runs(flat))
    fmoe.convert(link, tmp_path / "native of links", fsync=False)
    fmoe.convert(tmp_path / "native of links", tmp_path / "again", "hf", fsync=False)
    assert files(tmp_path / "again") == files(source)


@pytest.mark.parametrize("target", ["weights", "other/weights"])
def test_folders_that_are_links_within_the_directory_are_read(target, flat, tmp_path):
    source = below(flat, tmp_path / "hf", "in a folder")
    (source / target).parent.mkdir(exist_ok=True)
    (source / "sub").rename(source / target)
    (source / "sub").symlink_to(target)
    same(runs(source), runs(flat))
    same(fmoe.load(source), fmoe.load(flat))
    fmoe.convert(source, tmp_path / "native", fsync=False)
    same(fmoe.load(tmp_path / "native"), fmoe.load(flat))
    (tmp_path / "link").symlink_to("hf")
    same(fmoe.load(tmp_path / "link"), fmoe.load(flat))


def test_a_name_that_is_a_file_and_a_folder_of_others_is_refused(flat, tmp_path):
    source = below(flat, tmp_path / "hf", "in a folder")
    fmoe.convert(source, tmp_path / "native", fsync=False)
    text = (tmp_path / "native" / "fmoe.json").read_text()
    for name in ("config.json", "fmoe.journal", "model.safetensors.index.json.part"):
        (tmp_path / "native" / "fmoe.json").write_text(text.replace("sub/", f"{name}/").replace("sub\\/", f"{name}/"))
        with pytest.raises(fmoe.AdapterError, match=f"{name} would be a file, and a folder of others"):
            fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
        assert not (tmp_path / "back").exists()
