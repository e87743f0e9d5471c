"""What is written: waited for, under its own name only when whole, where it may be, and told of as it goes."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import PROGRAM, Run, demo, runner
from directories import INDEX, files
from processes import calls, end_all, start

import fmoe
from fmoe import AdapterError
from fmoe.types import human

JOURNAL = "fmoe.journal"


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def source(tmp_path) -> Path:
    path = Path(shutil.copytree(demo() / "hf", tmp_path / "source"))
    (path / "assets").mkdir()
    (path / "assets" / "a.txt").write_text("a")
    return path


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


def convert(source: Path, dst: Path, **how: object) -> fmoe.checkpoint.Report:
    return fmoe.convert(source, dst, max_shard_size="100KB", **how)


def expected(source: Path) -> dict[str, bytes]:
    dst = source.parent / "expected"
    convert(source, dst)
    return files(dst)


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
    assert ended.code == 1 and told.startswith(f"{dst}/") and told.endswith(f"{file}: {os.strerror(code)}"), told
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


def after(size: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """Progress that acts once so many bytes are done."""
    done: list[int] = []

    def progress(now: int, of: int) -> None:
        if now >= size and not done:
            done.append(now)
            act()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("how", [{}, {"max_shard_size": 1}, {"e": range(2, 4)}, {"force": True}], ids=str)
def test_a_dry_run_writes_nothing_and_says_what_would_be_written(how, source, tmp_path):
    parent = tmp_path / "parent"
    dst = parent / "out"
    if "force" in how:
        fmoe.convert(source, dst)
    before, there = files(tmp_path), sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    told: list[int] = []
    dry = fmoe.convert(source, dst, dry_run=True, progress=lambda done, of: told.append(done), **how)
    assert (files(tmp_path), sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))) == (before, there)
    assert (dry.read, dry.written, dry.resumed, dict(dry.checksums), told) == (0, 0, 0, {}, [])
    wet = fmoe.convert(source, dst, **how)
    same = ("path", "family", "tensors", "nbytes", "made", "files")
    assert [getattr(dry, n) for n in same] == [getattr(wet, n) for n in same]
    assert wet.files == len(list(dst.glob("*.safetensors"))) and wet.written > 0


def test_a_dry_run_refuses_what_the_run_would(source, tmp_path, run):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    for dst, flags, message in [("photos", (), "is not empty"), ("photos", ("--force",), "holds no checkpoint")]:
        code, out, err = run("convert", source, tmp_path / dst, "--dry-run", *flags)
        assert (code, out) == (1, "") and message in err
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=after(1, interrupt))
    before = files(tmp_path / "out")
    assert "beginnings of other work" in run("convert", source, tmp_path / "out", "--dry-run")[2]
    code, out, err = run("convert", source, tmp_path / "out", "--dry-run", "--max-shard-size", "100KB")
    assert (code, err) == (0, "") and files(tmp_path / "out") == before
    assert out == f"52 tensors -> 8 in 6 files would be written to {tmp_path / 'out'} (594.4 kB)\n"


@pytest.mark.parametrize("side", ["native", "hf"])
def test_checksums_are_those_of_all_files_of_both_sides(side, source, tmp_path, run):
    here, there = source, tmp_path / "out"
    if side == "hf":
        convert(source, tmp_path / "native")
        here = tmp_path / "native"
    code, out, err = run("convert", here, there, "--to", side, "--checksums", "--max-shard-size", "100KB")
    assert (code, err) == (0, "")
    lines = dict(reversed(line.split("  ")) for line in out.splitlines()[1:])
    every = [p for folder in (here, there) for p in folder.rglob("*") if p.is_file()]
    assert lines == {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in every}
    sums = "".join(line + "\n" for line in out.splitlines()[1:])
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict"], input=sums, text=True, check=True, timeout=60)
    shutil.rmtree(there)
    code, out, _ = run("convert", here, there, "--to", side, "--checksums", "--json", "--max-shard-size", "100KB")
    assert code == 0 and json.loads(out)["checksums"] == lines


@pytest.mark.parametrize("how", [{}, {"checksums": True}, {"e": range(1, 3)}, {"threads": 1}], ids=str)
def test_progress_begins_where_it_stopped_never_goes_back_and_ends_with_all(how, source, tmp_path):
    size, dst = fmoe.inspect(source)["bytes"], tmp_path / "out"
    of = size * (3 if "checksums" in how else 1)
    runs: list[list[int]] = [[]]

    def progress(done: int, all_: int) -> None:
        assert all_ == of
        runs[-1].append(done)
        if len(runs) < 4 and done >= len(runs) * size // 4:
            runs.append([])
            raise KeyboardInterrupt

    while True:
        try:
            report = convert(source, dst, progress=progress, **how)
            break
        except KeyboardInterrupt:
            assert JOURNAL in files(dst)
    assert len(runs) == 4 and runs[0][0] == 0 and runs[-1][-1] == of
    for before, now in zip(runs, runs[1:], strict=False):
        assert now == sorted(now) and 0 < now[0] <= before[-1] and before[-1] - now[0] <= size // 8
    assert 0 < report.resumed and report.written + report.resumed == sum(
        t["bytes"] for t in [{"bytes": fmoe.inspect(dst)["bytes"]}]
    )
    assert fmoe.convert(source, tmp_path / "other", max_shard_size="100KB", **how) and files(dst) == files(
        tmp_path / "other"
    )


def test_one_object_for_machines_and_nothing_else(source, tmp_path):
    call = ["convert", source, tmp_path / "out", "--json", "--checksums"]
    code, out, err = start(call, tmp_path / "notes").end()
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1) and found["files"] == 1 and found["written"] == 594432
    ended = start([*call[:2], tmp_path / "x", "--quiet"], tmp_path / "notes").end()
    assert ended == (0, f"52 tensors -> 8 in 1 file in {tmp_path / 'x'} (594.4 kB)\n", "")
    start([*call[:2], tmp_path / "y"], tmp_path / "notes", at=60, by=signal.SIGKILL).end()
    ended = start([*call[:2], tmp_path / "y"], tmp_path / "notes").end()
    assert ended.code == 0 and " of it by an earlier run)" in ended.out and ended.err == ""


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
