"""Links of a directory: followed within it and in a Hugging Face cache, and never out of either."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from changed_directories import OUTSIDE, A, put
from tiny import CONFIG, bases, lay

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.directory import open_checkpoint
from fmoe.testing import same

Change = Callable[[Path], object]


@pytest.fixture
def source(tmp_path) -> Path:
    return lay(bases()["qwen3_moe"], tmp_path / "source")


@pytest.fixture
def hub(tmp_path, source) -> Path:
    """A Hugging Face cache: blobs named by hash, and a snapshot of links to them."""
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "0a1b" / "sub").mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, root / "blobs" / f"{i:x}f00d")
        (root / "snapshots" / "0a1b" / file.name).symlink_to(f"../../blobs/{i:x}f00d")
    (root / "snapshots" / "0a1b" / "sub" / "note.txt").symlink_to("../../../blobs/0f00d")
    return root


def test_a_hugging_face_cache_is_read_through_its_links(hub, source, tmp_path):
    (tmp_path / "mine").symlink_to(hub / "snapshots" / "0a1b")
    for path in (hub / "snapshots" / "0a1b", tmp_path / "mine"):
        opened, expected = open_checkpoint(path), open_checkpoint(source)
        same(opened.read(opened.specs), expected.read(expected.specs))
        assert opened.others() == [Path(CONFIG), Path("sub/note.txt"), Path("tokenizer.json")]


@pytest.mark.parametrize("where", ["a blob that is a link", "a folder beside blobs", "another model's", "no snapshots"])
def test_a_cache_is_no_way_out(where, hub, tmp_path):
    path = hub / "snapshots" / "0a1b"
    (tmp_path / "secret").write_bytes((path / A).read_bytes())
    if where == "a blob that is a link":
        blob = (path / A).resolve()
        blob.unlink()
        blob.symlink_to(tmp_path / "secret")
    elif where == "no snapshots":
        path = (hub / "snapshots").rename(hub / "revisions") / "0a1b"
    else:
        folder = hub / "refs" if where == "a folder beside blobs" else tmp_path / "models--org--other" / "blobs"
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "secret", folder / "x")
        (path / A).unlink()
        (path / A).symlink_to(folder / "x")
    with pytest.raises(AdapterError, match=f"({A}|{CONFIG}) {OUTSIDE}"):
        open_checkpoint(path)


def test_links_within_a_directory_are_followed(source):
    (source / "weights").mkdir()
    (source / A).rename(source / "weights" / "a")
    (source / A).symlink_to("weights/a")
    fmoe.verify(source)


def test_links_from_folder_to_folder_within_a_directory_are_taken_along(source):
    (source / "a").mkdir()
    (source / "b").mkdir()
    (source / "a" / "x").write_text("x")
    (source / "b" / "x").symlink_to("../a/x")
    assert {Path("a/x"), Path("b/x")} <= set(open_checkpoint(source).others())


@pytest.mark.parametrize("checksums", [False, True])
def test_links_between_folders_go_there_and_back_as_files(checksums, hub, source, tmp_path):
    (source / "a").mkdir()
    (source / "a" / "x").write_text("x")
    for link in (source / "a" / "of the top", source / "a" / "of a link", source / "top"):
        link.symlink_to({"of the top": f"../{CONFIG}", "of a link": "../top", "top": "a/x"}[link.name])
    for src in (source, hub / "snapshots" / "0a1b"):
        native, back = tmp_path / f"{src.name} native", tmp_path / f"{src.name} back"
        fmoe.convert(src, native, checksums=checksums, fsync=False)
        fmoe.convert(native, back, "hf", checksums=checksums, fsync=False)
        fmoe.verify(native)
        there = [p.relative_to(src) for p in src.rglob("*") if p.is_file()]
        assert all((back / p).read_bytes() == (src / p).read_bytes() for p in there)
        assert not any(p.is_symlink() for p in back.rglob("*"))


OTHERS: dict[str, tuple[Change, str]] = {
    "a link out": (lambda p: (p / "notes.txt").symlink_to("/etc/passwd"), f"notes.txt {OUTSIDE}"),
    "a link out, below": (lambda p: ((p / "d").mkdir(), (p / "d" / "x").symlink_to("/etc/passwd")), f"d/x {OUTSIDE}"),
    "a link to a folder": (lambda p: (p / "etc").symlink_to("/etc"), f"etc {OUTSIDE}"),
    "a link to a folder of its own": (
        lambda p: ((p / "d").mkdir(), (p / "e").symlink_to("d")),
        "e is a directory, exp",
    ),
    "a link to nothing": (lambda p: (p / "x").symlink_to("y"), "x cannot be read: No such file"),
    "a pipe": (lambda p: os.mkfifo(p / "tokenizer.model"), "tokenizer.model is a pipe, a socket or a device, expected"),
    "a name of two lines": (put("a\nb", ""), r"source has a file named 'a\\nb': rename it"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_taken_along_only_if_they_may_be(name, source):
    change, match = OTHERS[name]
    change(source)
    with pytest.raises(AdapterError, match=match):
        open_checkpoint(source).others()
