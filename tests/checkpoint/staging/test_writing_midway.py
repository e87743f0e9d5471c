"""What happens midway: sources that are spoiled, saving that is interrupted, and what is left then."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conversions import after, convert, expected, interrupt
from directories import INDEX, files

import fmoe
from fmoe import AdapterError

JOURNAL = "fmoe.journal"


def old_ones(path: Path) -> dict[str, int]:
    return {n: (path / n).stat().st_ino for n in files(path)}


CHANGED = "(has changed since it was opened|ends before byte)"  # as a thread opens it next, or is reading it just now
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (lambda path: path.unlink(), "is not there"),
    "cut short": (lambda path: os.truncate(path, 1000), CHANGED),
    "written to": (lambda path: path.write_bytes(path.read_bytes()), CHANGED),
    "replaced": (lambda path: shutil.copy(path, f"{path}2") and os.replace(f"{path}2", path), "has changed since"),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", SPOILED)
def test_a_source_spoiled_midway_is_told_and_nothing_is_left(name, begun, source, tmp_path):
    spoil, match = SPOILED[name]
    dst = tmp_path / "out"
    if begun:
        with pytest.raises(KeyboardInterrupt):
            convert(source, dst, progress=after(20_000, interrupt))
        assert JOURNAL in files(dst)
    with pytest.raises(AdapterError, match=f"model-00002-of-00002.safetensors {match}"):
        work = after(300_000, lambda: spoil(source / "model-00002-of-00002.safetensors"))
        convert(source, dst, progress=work)
    assert not dst.exists()


def test_with_an_old_checkpoint_a_spoiled_source_leaves_that(source, tmp_path):
    fmoe.convert(source, tmp_path / "out")
    before = old_ones(tmp_path / "out")
    with pytest.raises(AdapterError, match="is not there"):
        convert(
            source,
            tmp_path / "out",
            force=True,
            progress=after(1, (source / "model-00002-of-00002.safetensors").unlink),
        )
    assert old_ones(tmp_path / "out") == before


def test_saving_is_interrupted_without_a_trace_and_the_old_checkpoint_stays(source, tmp_path):
    params, adapter = fmoe.load(source), fmoe.adapter(source)
    with pytest.raises(KeyboardInterrupt):
        fmoe.save(params, tmp_path / "out", adapter, progress=after(1, interrupt))
    assert not (tmp_path / "out").exists()
    fmoe.save(params, tmp_path / "out", adapter)
    before = old_ones(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        fmoe.save(params, tmp_path / "out", adapter, max_shard_size=1, force=True, progress=after(1, interrupt))
    assert old_ones(tmp_path / "out") == before


def test_saving_interrupted_among_the_new_names_can_be_done_again(source, tmp_path, monkeypatch):
    params, adapter, dst = fmoe.load(source), fmoe.adapter(source), tmp_path / "out"
    fmoe.save(params, dst, adapter)
    count = iter(range(99))

    def replace(src: Path, to: Path, real: Callable[..., None] = os.replace) -> None:
        real(src, to)
        if next(count) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            fmoe.save(params, dst, adapter, max_shard_size="50KB", force=True)
    with pytest.raises(AdapterError, match="is unfinished"):
        fmoe.load(dst)
    fmoe.save(params, dst, adapter, max_shard_size="100KB")
    fmoe.save(params, tmp_path / "new", adapter, max_shard_size="100KB")
    assert files(dst) == files(tmp_path / "new")


def test_a_source_that_cannot_be_read_just_now_can_be_gone_on_from(source, tmp_path, monkeypatch):
    dst, calls, preadv = tmp_path / "out", [], os.preadv

    def fails(*args):
        calls.append(args)
        if dst.exists() and len(calls) % 10 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        with pytest.raises(AdapterError, match="cannot be read at byte .*: Input/output error"):
            convert(source, dst, threads=1)
    assert (dst / JOURNAL).exists() and INDEX not in files(dst)
    assert convert(source, dst).resumed > 0
    assert files(dst) == expected(source)


@pytest.mark.parametrize("name", ["config.json", "fmoe.json", "model.safetensors"])
@pytest.mark.parametrize("end", ["", ".part"])
def test_a_folder_where_a_file_is_to_come_is_refused_before_anything_is_written(name, end, source, tmp_path):
    dst = tmp_path / "dst"
    fmoe.convert(source, dst)
    (dst / name).unlink() if not end else None
    (dst / f"{name}{end}").mkdir()
    (dst / f"{name}{end}" / "mine").write_text("mine")
    before = files(dst)
    with pytest.raises(AdapterError, match=f"{name}{end}"):
        fmoe.convert(source, dst, force=True)
    assert files(dst) == before


@pytest.mark.parametrize(
    "text", [b"", b"\xff\x00", b"null\n[]\n", b'{"a":' * 100_000, b'{"a":' + b"9" * 6000 + b"}"], ids=len
)
def test_a_journal_of_garbage_says_nothing_and_force_begins_anew(text, source, tmp_path):
    dst = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, dst, progress=after(20_000, interrupt))
    (dst / JOURNAL).write_bytes(text)
    with pytest.raises(AdapterError):
        fmoe.load(dst)
    try:
        convert(source, dst)
    except AdapterError:
        convert(source, dst, force=True)
    convert(source, tmp_path / "want")
    assert files(dst) == files(tmp_path / "want")
