"""`fmoe convert --ranks N` that is ended, in whatever way: its ranks end with it, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from directories import files

import fmoe

LONG = 90.0
JOURNAL = "fmoe.journal"
CASES = [(s, False) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP)]
CASES += [(signal.SIGTERM, True), (signal.SIGKILL, True)]  # ranks that write: seconds each


def children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def runs(pid: int) -> bool:
    """Whether any thread of it does: files are open, and locks held, until the last has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def wait_for(done: Callable[[], object], what: str) -> None:
    until = time.monotonic() + LONG
    while not done():
        assert time.monotonic() < until, what
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("by, begun", CASES, ids=lambda c: c.name if isinstance(c, signal.Signals) else str(c))
def test_no_rank_outlives_the_command_that_started_it(by, begun, hf, tmp_path):
    dst = tmp_path / "out"
    call = [sys.executable, "-m", "fmoe", "convert", str(hf), str(dst), "--ranks", "2", "--quiet", "--no-fsync"]
    with subprocess.Popen([*call, "--bandwidth", "1KB"], stderr=subprocess.DEVNULL, start_new_session=True) as parent:
        wait_for(lambda: len(children(parent.pid)) == 2, "no ranks were started")
        ranks = children(parent.pid)
        if begun:
            wait_for(lambda: dst.exists() and any(dst.rglob("*.part")), "nothing was begun")
        assert all(map(runs, ranks))
        os.kill(parent.pid, by)
        assert parent.wait(LONG) == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(by, -by)
        gone = parent.returncode > 0  # then it has seen to that itself
        assert not (gone and any(map(runs, ranks))), "it did not wait for its ranks"
        try:
            wait_for(lambda: not any(map(runs, ranks)), "a rank outlives its parent")
        finally:
            for rank in filter(runs, ranks):
                os.kill(rank, signal.SIGKILL)
    if begun:
        assert JOURNAL in files(dst)
        fmoe.convert(hf, dst, fsync=False)
        assert fmoe.verify(dst)
