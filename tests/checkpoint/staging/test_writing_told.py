"""What is written is told of: dry runs, checksums, progress, one object for machines."""

import hashlib
import json
import shutil
import signal
import subprocess

import pytest
from command import Run, runner
from conversions import after, convert, interrupt
from directories import files
from processes import start

import fmoe

JOURNAL = "fmoe.journal"


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


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
