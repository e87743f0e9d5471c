"""`fmoe ARGUMENTS` by several ranks, as torchrun would start them, forked from one process that has imported it."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from processes import STARTED, _context

LIMIT = 20_000  # bytes of a job: many of them


def rank(arguments: Sequence[str], folder: Path, environment: dict[str, str], slow: float, locks: bool) -> None:
    number = environment["RANK"]
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from fmoe import cli
    from fmoe.checkpoint import convert as _  # noqa: F401
    from fmoe.checkpoint.remote import ranks
    from fmoe.checkpoint.staging import locks as locking

    torch.set_num_threads(1)
    ranks.SILENT, ranks.GRACE = 10.0, 3.0
    module: Any = sys.modules["fmoe.checkpoint.convert"]
    engine = module.Engine
    module.Engine = partial(engine, limit=LIMIT)
    run = engine.run
    engine.run = lambda self, item: (time.sleep(slow), run(self, item))[1]
    if not locks:
        locking.fcntl.flock = _no_locks  # type: ignore[attr-defined]
    sys.argv = ["fmoe", *arguments]
    try:
        cli.main()
    except SystemExit as left:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(left.code if isinstance(left.code, int) else 1)


def _no_locks(*_: object) -> None:
    import errno

    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def ranks(
    arguments: Iterable[object],
    folder: Path,
    world: int,
    slow: float = 0,
    locks: bool = True,
    more: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> list[Any]:
    """The processes, begun. more: what else is in the environment of each."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    made = []
    for r in range(world):
        environment = common | {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(world), **more(r)}
        call = ([*map(str, arguments)], folder, environment, slow, locks)
        process = _context().Process(target=rank, args=call)
        process.start()
        STARTED.append(process)
        made.append(process)
    return made


def ended(processes: Sequence[Any], within: float = 60) -> list[int | None]:
    """Their exit codes; None of one that still runs."""
    until = time.monotonic() + within
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    return [process.exitcode for process in processes]
