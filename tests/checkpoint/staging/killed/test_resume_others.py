"""Two processes at one directory, and whoever looks: one writes, and nobody sees anything half written."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from directories import files
from killed import JOURNAL, command, lay
from processes import Started, calls, start

ON_DISK = True
"""Unlike its neighbours, this file writes to a real disk."""


def stopped(run: Started) -> None:
    for _ in range(1000):
        if Path(f"/proc/{run.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError("it has not stopped")


@pytest.mark.parametrize("force", [False, True])
def test_of_two_processes_one_converts_and_the_other_is_refused_at_once(force, source, new, older, tmp_path):
    dst = lay(older("more") if force else {}, tmp_path / "out")
    call = command(source, dst, *["--force"] * force)
    first = start(call, tmp_path / "1", at=45, by=signal.SIGSTOP)
    stopped(first)
    before = files(dst)
    for more in ((), ("--force",)):
        second = start([*call, *more], tmp_path / "2").end()
        assert second == (1, "", f"fmoe: {dst}: another process is writing to it: let it end, or stop it\n")
    assert files(dst) == before
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.end().code == 0 and files(dst) == new


@pytest.mark.parametrize("where", [f"open {JOURNAL}", f"flock {JOURNAL}", "mkdir out"])
def test_who_comes_as_another_ends_replaces_nothing(where, source, new, tmp_path):
    dst = tmp_path / "out"
    start(command(source, dst), tmp_path / "1").end()
    made = calls(tmp_path / "1")
    shutil.rmtree(dst)
    force = ["--force"] * (where == f"flock {JOURNAL}")  # even so: what it has locked is no longer there
    late = start(command(source, dst, *force), tmp_path / "1", at=made.index(where), by=signal.SIGSTOP)
    stopped(late)
    assert start(command(source, dst), tmp_path / "2").end().code == 0
    before = {p: p.stat().st_ino for p in dst.iterdir()}
    os.kill(late.process.pid, signal.SIGCONT)
    ended = late.end()
    assert ended.code == 1 and ("has just finished writing" if force else "is not empty") in ended.err
    assert files(dst) == new and {p: p.stat().st_ino for p in dst.iterdir()} == before


def test_nobody_who_looks_sees_anything_half_written(source, new, older, tmp_path):
    old = older("same")
    for k, found in enumerate(({}, old)):
        dst = lay(found, tmp_path / f"out{k}")
        run = start(command(source, dst, "--force"), tmp_path / f"notes{k}", slow=0.01)
        looks = 0
        while run.process.is_alive():
            for path in dst.glob("*.safetensors") if dst.exists() else ():
                try:
                    assert path.read_bytes() in (new.get(path.name), found.get(path.name))
                    looks += 1
                except FileNotFoundError:
                    pass
        assert run.end().code == 0 and files(dst) == new and (looks or not found)
