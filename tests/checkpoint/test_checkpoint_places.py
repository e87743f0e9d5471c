"""Where nothing is written: places, directories that hold something else, and errors midway."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from directories import files, fill

import fmoe
import fmoe.dcp
from fmoe import AdapterError
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.stream.engine import Engine

JOURNAL = "fmoe.journal"
Change = Callable[[Path], object]


@pytest.fixture
def source(tmp_path) -> Path:
    return fill(tmp_path / "source", "qwen3_moe-float32")


def text(name: str, content: str | bytes) -> Change:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


PLACES: dict[str, tuple[str, Change, str]] = {
    "the source": ("source", lambda root: None, "is the source itself"),
    "the source, with a slash": ("source/", lambda root: None, "is the source itself"),
    "the source, in a round way": ("other/../source", lambda root: (root / "other").mkdir(), "is the source itself"),
    "the source, by a link": ("link", lambda root: (root / "link").symlink_to(root / "source"), "is the source itself"),
    "inside the source": ("source/native", lambda root: None, "lies inside it"),
    "inside, by a link": ("link/native", lambda root: (root / "link").symlink_to(root / "source"), "lies inside it"),
    "a file": ("file", text("file", "x"), "is a file: name a directory"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_some_places_are_never_written_to(name, force, source, tmp_path):
    dst, prepare, match = PLACES[name]
    prepare(tmp_path)
    before = files(tmp_path)
    with pytest.raises(AdapterError, match=match):
        fmoe.convert(source, f"{tmp_path}/{dst}", force=force)
    assert files(tmp_path) == before


@pytest.mark.parametrize("nothing", ["", "s3://", "hf://", "file://", "gs:///", "https:// ", "a\0b", "\ud800"])
def test_an_address_of_nothing_is_no_directory_of_that_name(nothing, source, tmp_path, monkeypatch):
    """As of a variable that is not set: s3://$BUCKET; nor is what no file can be called."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    adapter, native = fmoe.adapter(source), fmoe.load(source)
    for call in (
        lambda: fmoe.convert(source, nothing),
        lambda: fmoe.convert(nothing, "out"),
        lambda: fmoe.convert(source, "out", config=nothing),
        lambda: fmoe.dcp.save(native, nothing, adapter),
        lambda: fmoe.save(native, nothing, adapter),
        lambda: fmoe.load(nothing),
        lambda: fmoe.adapter(nothing),
        lambda: fmoe.lora.load(nothing, adapter),
        lambda: fmoe.lora.save(fmoe.lora.init(native, r=2), nothing, adapter),
    ):
        with pytest.raises(AdapterError, match="(nothing is named, expected the|can have this name, expected a) path"):
            call()
    assert not files(tmp_path / "here")


def test_a_directory_is_replaced_by_force_alone_and_only_if_it_holds_a_checkpoint(source, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    fmoe.convert(source, mine)  # an empty one is fine
    (mine / "notes.txt").write_text("keep")
    before = files(mine)
    with pytest.raises(AdapterError, match=f"{mine} is not empty: .*--force"):
        fmoe.convert(source, mine)
    assert files(mine) == before
    (mine / "model.safetensors.part").write_text("left by a run that was killed")
    fmoe.convert(source, mine, force=True, max_shard_size=100_000)
    expected = fmoe.convert(source, tmp_path / "fresh", max_shard_size=100_000)
    assert files(mine) == files(Path(expected.path)) | {"notes.txt": b"keep"}
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    with pytest.raises(AdapterError, match=f"{photos} holds no checkpoint, but 'cat.jpg'"):
        fmoe.convert(source, photos, force=True)
    assert files(photos) == {"cat.jpg": b"cat"}


def test_what_is_there_already_is_not_converted_again(source, tmp_path):
    fmoe.convert(source, tmp_path / "native")
    for path, to, match in [
        (source, "hf", "source is a Hugging Face checkpoint already"),
        (tmp_path / "native", "native", "native is native already"),
        (source, "gguf", "to='gguf' needs like=FILE.gguf"),
        (source, "ggml", "to='ggml': expected 'native' or 'hf', or a model type"),
    ]:
        with pytest.raises(AdapterError, match=match):
            fmoe.convert(path, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def failing(function: Callable, after: int, error: type[BaseException]) -> Callable:
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise error("midway")
        return function(*args, **kwargs)

    return call


MIDWAY = [(Engine, "run", 0), (Engine, "run", 25), (Staging, "begin", 0), (Staging, "part", 2), (Staging, "mark", 9)]
MIDWAY += [(shutil, "copyfile", 1), (Staging, "publish", 0), (os, "replace", 0), (os, "replace", 3)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, AdapterError])
@pytest.mark.parametrize("where, name, after", MIDWAY)
@pytest.mark.parametrize("force", [False, True])
def test_an_error_midway_is_gone_on_from_and_bad_input_leaves_nothing(
    where, name, after, error, force, source, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    new = fmoe.convert(source, tmp_path / "new", max_shard_size=60_000)
    if force:
        fmoe.convert(source, out, max_shard_size=1)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing(getattr(where, name), after, error))
        with pytest.raises(error, match="midway"):
            fmoe.convert(source, out, force=force, max_shard_size=60_000)
    begun, renaming = name != "begin", where is os
    if error is AdapterError and not renaming or not begun:
        assert files(tmp_path) == before and out.exists() == force
    else:
        assert JOURNAL in files(out) and any(n.endswith(".part") for n in files(out))
        if not renaming:
            old = {n: data for n, data in before.items() if n.startswith("out/")}
            assert old.items() <= files(tmp_path).items()
        for look in (fmoe.inspect, fmoe.load, fmoe.verify):
            with pytest.raises(AdapterError, match=f"{out} is unfinished: {JOURNAL} "):
                look(out)
        force = False
    again = fmoe.convert(source, out, force=force, max_shard_size=60_000)
    assert files(out) == files(tmp_path / "new") and again.written + again.resumed == new.written


def test_no_directory_is_made_below_a_file_or_at_a_path_too_long(source, tmp_path):
    (tmp_path / "file").write_text("x")
    adapter, params = fmoe.adapter(source), fmoe.load(source)
    for place, why in ((tmp_path / "file" / "sub", "Not a directory"), (tmp_path / ("x/" * 2500), "characters")):
        for call in (lambda at: fmoe.convert(source, at), lambda at: fmoe.save(params, at, adapter)):
            with pytest.raises(AdapterError, match=why):
                call(place)
    for call in (fmoe.load, fmoe.inspect, fmoe.verify, fmoe.adapter, lambda at: fmoe.convert(at, tmp_path / "new")):
        for place in ("x" * 5000, f"file:///{'x' * 5000}", tmp_path / ("x" * 300)):
            with pytest.raises(AdapterError, match="characters, expected a shorter one"):
                call(place)
