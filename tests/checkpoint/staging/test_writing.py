"""What is written: waited for, under its own name only when whole, and where it may be."""

import errno
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import PROGRAM
from conversions import convert, expected
from directories import INDEX, files
from processes import calls, start

import fmoe
from fmoe import AdapterError
from fmoe.types import human

JOURNAL = "fmoe.journal"


def test_every_file_is_on_the_disk_before_it_gets_its_name_and_the_names_before_the_journal_goes(source, tmp_path):
    assert start(["convert", source, tmp_path / "out", "--max-shard-size", "100KB"], tmp_path / "notes").end().code == 0
    made = calls(tmp_path / "notes")
    at = lambda call: made.index(call)
    last = lambda call: len(made) - 1 - made[::-1].index(call)
    names = [n for n in files(tmp_path / "out") if n != "assets/a.txt"] + ["a.txt"]
    replaced = [at(f"replace {n}.part") for n in names]
    publishing = last(f"write {JOURNAL}")
    for name in names:
        wrote = [k for k, call in enumerate(made) if call.split()[1] == f"{name}.part" and "write" in call]
        assert max(wrote, default=0) < last(f"fsync {name}.part") < publishing
    synced = [k for k, call in enumerate(made) if call == "fsync out"]
    assert last("fsync assets") > max(replaced) and at("fsync assets") < publishing
    assert publishing < at(f"fsync {JOURNAL}") or last(f"fsync {JOURNAL}") > publishing
    assert last(f"fsync {JOURNAL}") < min(replaced) and max(replaced) == at(f"replace {INDEX}.part")
    assert max(replaced) < synced[-2] < at(f"unlink {JOURNAL}") < synced[-1]
    assert at(f"fsync {JOURNAL}") < at("open model-00001-of-00006.safetensors.part")


FAILS = {
    "no room for a file": (("open",), 3, errno.ENOSPC, ".safetensors.part"),
    "no room for data": (("pwrite", "copy_file_range"), 12, errno.ENOSPC, ".safetensors.part"),
    "a disk that fails": (("pwrite", "copy_file_range"), 0, errno.EIO, ".safetensors.part"),
    "no room for the journal": (("write",), 12, errno.ENOSPC, JOURNAL),
    "no room for another file": (("sendfile",), 0, errno.ENOSPC, ".part"),
    "no room on the way to the disk": (("fsync",), 5, errno.ENOSPC, ".part"),
    "no renaming": (("replace",), 3, errno.EIO, ".safetensors.part"),
}


@pytest.mark.parametrize("name", FAILS)
def test_an_error_of_the_disk_names_the_file_and_can_be_gone_on_from(name, source, tmp_path):
    which, number, code, file = FAILS[name]
    dst, call = tmp_path / "out", ["convert", source, tmp_path / "out", "--max-shard-size", "100KB", "--json"]
    new = expected(source)
    ended = start(call, tmp_path / "notes", fails=(which, number, code)).end()
    (told,) = json.loads(ended.out)["error"]["problems"]
    fix = ". Fix: make room, then run it again" if code == errno.ENOSPC else ""
    assert ended.code == 1 and told.startswith(f"{dst}/") and told.endswith(f"{file}: {os.strerror(code)}{fix}"), told
    assert ended.err == f"fmoe: {told}\n"
    assert INDEX not in files(dst) and JOURNAL in files(dst)
    with pytest.raises(AdapterError, match="is unfinished"):
        fmoe.inspect(dst)
    ended = start(call, tmp_path / "notes").end()
    assert ended.code == 0 and files(dst) == new
    assert json.loads(ended.out)["resumed"] > 0 or name not in ("no room for another file", "no renaming")


@pytest.fixture
def little(tmp_path) -> Iterator[Path]:
    """A disk of 400 kB."""
    path = tmp_path / "little"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_disk_that_is_full_is_told_before_and_midway(source, little, tmp_path, monkeypatch):
    match = r"little/out needs 605.0 kB, and .*little has \d+.\d kB free: make room"
    with pytest.raises(AdapterError, match=match):
        fmoe.convert(source, little / "out")
    assert files(little) == {} and list(little.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
        with pytest.raises(OSError) as error:
            fmoe.convert(source, little / "out")
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(little / "out/model.safetensors.part")
    assert set(files(little / "out")) == {"model.safetensors.part", JOURNAL}
    subprocess.run(["mount", "-o", "remount,size=2m", little], check=True)
    report = fmoe.convert(source, little / "out")  # on another disk than the source, too
    fmoe.convert(source, tmp_path / "expected")
    assert files(little / "out") == files(tmp_path / "expected") and report.resumed > 100_000
    assert human(sum(path.stat().st_size for path in (little / "out").rglob("*") if path.is_file())) == "605.0 kB"


def test_room_is_asked_for_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=600_000))
    for how in ({}, {"dry_run": True}):
        with pytest.raises(AdapterError, match="out needs 605.0 kB, and .* has 600.0 kB free: make room"):
            fmoe.convert(source, tmp_path / "a" / "out", **how)
    assert not (tmp_path / "a").exists()


def test_a_limit_on_the_size_of_files_is_told_with_the_file(source, tmp_path):
    dst = tmp_path / "out"
    limited = f"trap '' XFSZ; ulimit -f 100; exec '{PROGRAM}' convert '{source}' '{dst}'"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"fmoe: {dst}/model.safetensors.part: File too large\n"
    fmoe.convert(source, dst)
    assert fmoe.verify(dst).tensors == 8 and JOURNAL not in files(dst)


FORBIDDEN: dict[str, tuple[str, int, str]] = {
    "the parent": ("parent", 0o555, "parent/out: Permission denied"),
    "the directory": ("parent/out", 0o555, "parent/out: Permission denied"),
    "a closed directory": ("parent/out", 0o000, "parent/out: Permission denied"),
    "the source": ("source", 0o000, "source cannot be read: Permission denied"),
    "a shard of the source": ("source/model-00002-of-00002.safetensors", 0o000, "cannot be read: Permission denied"),
    "a text of the source": ("source/assets", 0o000, "cannot be read: Permission denied"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_refused_permission_names_the_file_and_changes_nothing(name, source, tmp_path):
    where, mode, message = FORBIDDEN[name]
    (tmp_path / "parent" / "out").mkdir(parents=True)
    if name == "the parent":
        (tmp_path / "parent" / "out").rmdir()
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / where).chmod(mode)
    try:
        call = ["convert", source, tmp_path / "parent" / "out"]
        ended, dry = (start([*call, *m], tmp_path.with_name("notes"), powers=False).end() for m in ([], ["--dry-run"]))
    finally:
        (tmp_path / where).chmod(0o755)
    assert (ended.code, ended.out) == (1, "") and message in ended.err and dry == ended, ended.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_a_directory_is_the_directory_and_a_link_to_nowhere_is_nothing(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    convert(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "real") == expected(source)
    (tmp_path / "nowhere").symlink_to("gone")
    for force in (False, True):
        with pytest.raises(AdapterError, match="nowhere is a link to nowhere: name a directory"):
            convert(source, tmp_path / "nowhere", force=force)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_leaves(umask, mode, source, tmp_path):
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / "out" / n).stat().st_mode) for n in files(tmp_path / "out")} == {mode}


def test_what_lies_under_our_temporary_names_is_neither_written_through_nor_left(source, tmp_path):
    dst, precious = tmp_path / "out", tmp_path / "precious"
    fmoe.convert(source, dst)
    precious.write_text("mine")
    (dst / "config.json.part").write_text("x" * 10_000)
    (dst / "model.safetensors.part").symlink_to(precious)
    (dst / "model-00001-of-00009.safetensors.part").write_text("x")
    (dst / "model-00001-of-00006.safetensors.part").symlink_to(precious)
    (dst / "mine.part").write_text("x")
    convert(source, dst, force=True)
    assert files(dst) == expected(source) | {"mine.part": b"x"} and precious.read_text() == "mine"
