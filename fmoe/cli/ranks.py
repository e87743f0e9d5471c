"""`fmoe convert` as one of several processes: those that torchrun has started, or those that --ranks starts."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

WAIT = 60.0  # seconds that ranks wait for each other to appear, and that they have to end once one has
PARENT = "FMOE_PARENT"  # the end of a pipe whose other end is held by the process that --ranks is an option of


def world() -> int:
    """How many processes torchrun, or --ranks, says that there are."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


@contextmanager
def group() -> Iterator[Any]:
    """The process group of all of them; None where there is but one."""
    if world() == 1:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    try:
        yield dist.new_group(backend="gloo", timeout=timedelta(days=7))
    finally:
        dist.destroy_process_group()


def first() -> bool:
    """Whether this one speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def end_with_parent() -> None:
    """A rank that --ranks has started ends as soon as the process that did, in whatever way that has ended."""
    if pipe := os.environ.pop(PARENT, ""):
        threading.Thread(target=_until, args=(int(pipe),), daemon=True).start()


def _until(pipe: int) -> None:
    os.read(pipe, 1)  # nobody writes: it ends when the other end is closed
    os._exit(1)


def started(ranks: int, arguments: list[str]) -> int:
    """`fmoe ARGUMENTS` in so many processes of this machine. The exit code: 0 where all have ended well.

    None outlives this one: it ends them where it is told to end, and where it is killed they see that (PARENT).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    where["LOCAL_WORLD_SIZE"] = str(ranks)
    call = [sys.executable, "-m", "fmoe", *arguments]
    running: list[subprocess.Popen[bytes]] = []
    failed, told = 0.0, list[int]()  # no signal ends it between a rank's start and the note of it
    heard = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, lambda number, _: told.append(number)) for s in heard}
    theirs, ours = os.pipe()
    where[PARENT] = str(theirs)
    try:
        for r in range(ranks):
            env = os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)}
            running.append(subprocess.Popen(call, env=env, pass_fds=(theirs,)))
        while any(process.poll() is None for process in running) and not told:
            if any(process.returncode for process in running):
                failed = failed or time.monotonic()
                if time.monotonic() - failed > WAIT:
                    break
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()  # nothing, where it has ended
        for process in running:
            process.wait()
        for end in (theirs, ours):
            os.close(end)
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise KeyboardInterrupt if told[0] == signal.SIGINT else SystemExit(128 + told[0])
    return next((abs(process.returncode) for process in running if process.returncode), 0)
