"""Real processes that run `fmoe`, to be killed: forked from one that has imported it, so that each costs milliseconds.

start(["convert", src, dst], notes).end()    # a process, and what became of it: (exit code, output, errors)
start([...], notes, at=7).end()              # SIGKILL of itself before its 7th change of the disk
power_failure(dst, notes)                    # and what had not been synced is lost
calls(notes)                                 # all those changes, in order
"""

import builtins
import ctypes
import fcntl
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from functools import cache
from itertools import chain, repeat
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from distributed import PRELOADED

CHANGES = (
    "write",
    "pwrite",
    "copy_file_range",
    "sendfile",
    "fsync",
    "ftruncate",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
)
LIMIT, SYNC = 100_000, 200_000  # bytes of a job, and from one wait for the disk to the next: many of both
STARTED: list[ForkServerProcess] = []


class Ended(NamedTuple):
    """code: the exit code, or minus the signal."""

    code: int | None
    out: str
    err: str


class Started(NamedTuple):
    process: ForkServerProcess
    folder: Path

    def end(self, after: float | None = None, by: int = signal.SIGKILL) -> Ended:
        """What became of it; after: the seconds from which on it is killed, if it still runs."""
        if after is not None:
            self.process.join(after)
            if self.process.is_alive() and self.process.pid:
                with suppress(ProcessLookupError):  # it ended in between
                    os.kill(self.process.pid, by)
        self.process.join(60)
        assert self.process.exitcode is not None, "it hangs"
        return Ended(self.process.exitcode, (self.folder / "out").read_text(), (self.folder / "err").read_text())


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(arguments: Iterable[object], folder: Path, **how: Any) -> Started:
    """`fmoe ARGUMENTS` in a process; folder: for its own notes. how: as `_run` has it."""
    folder.mkdir(exist_ok=True)
    for name in ("out", "err", "calls"):
        (folder / name).write_text("")
    process = _context().Process(target=_run, args=([*map(str, arguments)], folder), kwargs=how)
    process.start()
    STARTED.append(process)
    return Started(process, folder)


def end_all() -> None:
    """Nothing that a failed test started outlives it, stopped or not."""
    while STARTED:
        STARTED.pop().kill()


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def _run(
    arguments: list[str],
    folder: Path,
    at: int | None = None,
    by: int = signal.SIGKILL,
    slow: float = 0,
    limit: int = LIMIT,
    boot: str = "one",
    fails: tuple[tuple[str, ...], int, int] | None = None,
    powers: bool = True,
) -> None:
    """at: the number of the change of the disk before which it is killed (by: another signal). slow: seconds that each
    job takes more. boot: which start of the machine it is. fails: (calls of `os`, from which of them on, the errno that
    they give). powers: root's, over files that others may not touch.

    With `--threads=1` the order of the changes is the same in every run.
    """
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from functools import partial

    import torch

    from fmoe import cli
    from fmoe.checkpoint import convert as _  # noqa: F401
    from fmoe.checkpoint.staging import journal
    from fmoe.checkpoint.stream import carrying

    torch.set_num_threads(1)
    module = sys.modules["fmoe.checkpoint.convert"]
    engine = module.Engine  # type: ignore[attr-defined]
    module.Engine, carrying.SYNC = partial(engine, limit=limit), SYNC  # type: ignore[attr-defined]
    sys.modules["fmoe.checkpoint.between"].Engine = module.Engine  # type: ignore[attr-defined]
    if "--threads=1" in arguments:
        pools = chain([Later()], repeat(AtOnce()))  # the jobs, and the waiting for the disk beside them
        carrying.pool = lambda threads: nullcontext(next(pools))  # type: ignore[assignment]
    (folder / "boot").write_text(boot)
    journal._BOOT = folder / "boot"
    if slow:
        run = engine.run
        engine.run = lambda self, item: (time.sleep(slow), run(self, item))[1]
    if not powers:
        _plain()
    _watched(folder, at, by, fails)
    sys.argv = ["fmoe", *arguments]
    try:
        cli.main()
    except SystemExit as left:  # without taking the interpreter down bit by bit
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(left.code if isinstance(left.code, int) else 1)


class Later:
    """One thread that is this one: a job is carried out when it is asked for, so that every run has the same order."""

    def submit(self, run: Callable[..., Any], *args: Any) -> Any:
        return SimpleNamespace(result=lambda: run(*args))


class AtOnce(Later):
    def submit(self, run: Callable[..., Any], *args: Any) -> Any:
        done = run(*args)
        return SimpleNamespace(result=lambda: done, done=lambda: True)


def _plain() -> None:
    """Root without its power over the permissions of files."""
    libc, head, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(head, data)
    data[0] &= ~0b110
    data[1] &= ~0b110
    assert libc.capset(head, data) == 0


def _watched(folder: Path, at: int | None, by: int, fails: tuple[tuple[str, ...], int, int] | None) -> None:
    """Every change of the disk is written down, and one of them may be the last thing before death."""
    log = os.open(folder / "calls", os.O_WRONLY | os.O_APPEND)
    shadow = folder / "shadow"
    shadow.mkdir(exist_ok=True)
    real = {name: getattr(os, name) for name in (*CHANGES, "open")}
    count, seen = 0, dict[str, int]()

    def change(name: str, what: str | Path) -> None:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), by)
        count += 1
        real["write"](log, f"{name} {Path(what).name}\n".encode())
        if fails and name in fails[0]:
            seen[name] = seen.get(name, -1) + 1
        if fails and name in fails[0] and seen[name] >= fails[1]:
            raise OSError(fails[2], os.strerror(fails[2]), *([str(what)] if isinstance(what, Path) else []))

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            first = args[name == "copy_file_range"]
            change(name, os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else Path(first))
            if name == "unlink":
                (shadow / str(os.lstat(args[0]).st_ino)).write_bytes(b"")
            done = real[name](*args, **how)
            if name == "fsync" and not os.path.isdir(f"/proc/self/fd/{first}"):
                with real_open(f"/proc/self/fd/{first}", "rb") as file:
                    (shadow / str(os.fstat(first).st_ino)).write_bytes(file.read())
            return done

        return call

    real_open = io.open

    def opened(path: Any, mode: str = "r", *args: Any, **how: Any) -> Any:
        if "w" in mode and not str(path).startswith(str(folder)):
            change("open", Path(path))
            real_open(path, mode, *args, **how).close()
            change("opened", Path(path))
        return real_open(path, mode, *args, **how)

    def opened_os(path: Any, flags: int, *args: Any, **how: Any) -> int:
        if flags & os.O_CREAT:
            change("open", Path(path))
        return real["open"](path, flags, *args, **how)

    flock = fcntl.flock
    fcntl.flock = lambda file, how: (change("flock", "fmoe.journal"), flock(file, how))[1]
    for name in CHANGES:
        setattr(os, name, watched(name))
    os.open = opened_os  # type: ignore[assignment]
    io.open = builtins.open = opened  # type: ignore[assignment]


def power_failure(path: Path, folder: Path, *, notes: bool) -> None:
    """What had not been synced is lost: zeros where there was data. notes: what the journal said is not."""
    for file in [p for p in path.rglob("*") if p.is_file()]:
        synced = folder / "shadow" / str(file.stat().st_ino)
        held, size = synced.read_bytes() if synced.exists() else b"", file.stat().st_size
        if file.name == "fmoe.journal":
            if not notes:
                file.write_bytes(held)
        else:
            file.write_bytes(held[:size].ljust(size, b"\0"))


def journal_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "fmoe.journal").read_text().splitlines() if line]
