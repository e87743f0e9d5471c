"""Files that fail, or change after they were opened, are named; and nothing stays open."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed_directories import OUTSIDE, A, B
from tiny import CONFIG, INDEX, bases, lay

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.directory import Checkpoint, open_checkpoint
from fmoe.testing import same

Change = Callable[[Path], object]


@pytest.fixture
def source(tmp_path) -> Path:
    return lay(bases()["qwen3_moe"], tmp_path / "source")


def refusing(path: Path, number: int) -> Callable[..., Any]:
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return call


@pytest.mark.parametrize("file", [CONFIG, INDEX, A])
def test_a_file_that_may_not_be_read_is_named(file, source, monkeypatch):
    opened = os.open
    refuse = refusing(source / file, 13)
    monkeypatch.setattr(os, "open", lambda p, *a, **k: (refuse if Path(p).name == file else opened)(p, *a, **k))
    with pytest.raises(AdapterError, match=f"{file} cannot be read: Permission denied"):
        open_checkpoint(source)


def test_a_directory_that_may_not_be_read_is_named(source, monkeypatch):
    monkeypatch.setattr(os, "listdir", refusing(source, 13))
    with pytest.raises(AdapterError, match="source cannot be read: Permission denied"):
        open_checkpoint(source)


def test_a_disk_that_fails_names_file_and_place(source, monkeypatch):
    opened = open_checkpoint(source)
    monkeypatch.setattr(os, "preadv", refusing(source, 5))
    with pytest.raises(AdapterError, match=f"{A} cannot be read at byte [0-9,]+: Input/output error"):
        opened.read(opened.specs)


def test_short_reads_are_continued(source, monkeypatch):
    opened, whole = open_checkpoint(source), os.preadv
    expected = opened.read(opened.specs)
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:3]], at))
    same(opened.read(opened.specs), expected)


def rewritten(path: Path) -> None:
    data, was = path.read_bytes(), os.stat(path).st_mtime_ns
    path.write_bytes(data[:-1] + b"\x07")
    os.utime(path, ns=(was, was + 1))


def exchanged(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


CHANGES: dict[str, tuple[Change, str]] = {
    "cut short": (
        lambda p: os.truncate(p, 100),
        r"has changed since it was opened \([0-9,]+ bytes, now 100\): nothing",
    ),
    "cut to nothing": (lambda p: os.truncate(p, 0), r"has changed since it was opened \([0-9,]+ bytes, now 0\)"),
    "grown": (lambda p: os.truncate(p, 10**6), r"has changed since it was opened \([0-9,]+ bytes, now 1,000,000\)"),
    "written to": (rewritten, r"has changed since it was opened \(the same size, written later\)"),
    "exchanged": (exchanged, "has changed since it was opened"),
    "gone": (lambda p: p.unlink(), "is not there"),
    "a pipe now": (lambda p: (p.unlink(), os.mkfifo(p)), "is a pipe, a socket or a device, expected a file"),
    "a link out now": (lambda p: (p.unlink(), p.symlink_to("/etc/passwd")), OUTSIDE),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_after_it_was_opened_is_refused(name, source):
    opened = open_checkpoint(source)
    change, match = CHANGES[name]
    change(source / A)
    for job in (lambda: opened.read(opened.specs), opened.unchanged):
        with pytest.raises(AdapterError, match=f"{A} {match}"):
            job()


@pytest.mark.parametrize("change", [lambda p: os.truncate(p, 100), rewritten], ids=["cut", "written to"])
def test_a_file_that_changes_while_it_is_read_is_refused(change, source, monkeypatch):
    opened, whole = open_checkpoint(source), os.preadv
    done: list[int] = []

    def change_then_read(fd: int, into: Any, at: int) -> int:
        if not done:
            done.append(change(source / A))  # type: ignore[func-returns-value]
        return whole(fd, into, at)

    monkeypatch.setattr(os, "preadv", change_then_read)
    with pytest.raises(AdapterError, match=f"{A} (ends before byte|has changed since it was opened)"):
        opened.read([n for n in opened.specs if opened.files[n] == A])


def test_a_pipe_put_there_between_the_look_and_the_opening_neither_waits_nor_leaks(source, monkeypatch):
    looked, sound = os.stat, os.stat(source / B)
    (source / A).unlink()
    os.mkfifo(source / A)
    monkeypatch.setattr(os, "stat", lambda p, *a, **k: sound if str(p).endswith(A) else looked(p, *a, **k))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterError, match=f"{A} is a pipe, a socket or a device, expected a file"):
        open_checkpoint(source)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_leaves_no_descriptor_behind(source):
    before = len(os.listdir("/proc/self/fd"))
    opened = open_checkpoint(source)
    opened.read(opened.specs)
    (source / A).unlink()
    os.mkfifo(source / A)
    for job in (lambda: opened.read(opened.specs), lambda: open_checkpoint(source)):
        with pytest.raises(AdapterError):
            job()
    assert len(os.listdir("/proc/self/fd")) == before


def test_offsets_say_where_the_bytes_are(source):
    opened: Checkpoint = open_checkpoint(source)
    for name, tensor in opened.read(opened.specs).items():
        data = (source / opened.files[name]).read_bytes()[opened.offsets[name] :]
        assert data.startswith(fmoe.types.bits(tensor).numpy().tobytes())


def test_a_read_of_the_engines_own_is_as_strict(source):
    opened = open_checkpoint(source)
    with disk.reading(source / A, opened.stamps[A]) as file, pytest.raises(AdapterError, match=f"{A} ends before byte"):
        disk.read_at(source / A, file, memoryview(bytearray(100)), opened.stamps[A].size - 1)
