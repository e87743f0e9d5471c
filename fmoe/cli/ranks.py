"""`fmoe convert` as one of several processes: those that torchrun has started, or those that --ranks starts."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

WAIT = 60.0  # seconds that ranks wait for each other to appear, and that they have to end once one has


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


def started(ranks: int, arguments: list[str]) -> int:
    """`fmoe ARGUMENTS` in so many processes of this machine. The exit code: 0 where all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    where["LOCAL_WORLD_SIZE"] = str(ranks)
    call = [sys.executable, "-m", "fmoe", *arguments]
    running = [
        subprocess.Popen(call, env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)
    ]
    failed = 0.0
    try:
        while any(process.poll() is None for process in running):
            if any(process.returncode for process in running):
                failed = failed or time.monotonic()
                if time.monotonic() - failed > WAIT:
                    break
            time.sleep(0.05)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
    return next((abs(process.returncode) for process in running if process.returncode), 0)
