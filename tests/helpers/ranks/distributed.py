"""Real processes for tests: `run(f, 4, x)` is [f(x) on rank 0, ..., f(x) on rank 3], joined by gloo.

`f`, its arguments and its results are pickled, so `f` lives at the top of a module. The first failure of any rank is
raised here with that rank's traceback; past the timeout the ranks still alive are killed and their stacks are shown.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["distributed", "processes", "fmoe.nn", "fmoe.parallel", "fmoe.checkpoint.convert"]
PRELOADED += ["fmoe.cli.change", "fmoe.cli.compare", "fmoe.cli.look", "rich.progress", "rich.traceback"]
PRELOADED += ["fmoe.checkpoint.verify", "typer._adapters", "pydantic"]
"""One server forks for a whole test process: of ranks, and of programs that are killed."""


def run(
    function: Callable[..., Any], n_ranks: int, *args: Any, timeout: float = 120, dies: Sequence[int] = ()
) -> list[Any]:
    """[function(*args) on each rank]. RuntimeError with the child's traceback, TimeoutError after `timeout` seconds.

    dies: ranks that kill themselves on the way, whose result is None; nobody waits for them at the end.
    """
    server, deadline = _server(), time.time() + timeout
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = (folder, n_ranks, deadline, not dies, dict(os.environ), function, args)
        ranks = [server.Process(target=_child, args=(rank, *told), daemon=True) for rank in range(n_ranks)]
        try:
            for process in ranks:
                process.start()
            waited = {rank: p for rank, p in enumerate(ranks) if rank not in dies}
            alive = _watch(waited, deadline)
            found = _results(folder, waited, alive, f"{function.__name__} on {n_ranks} ranks")
            return [found.get(rank) for rank in range(n_ranks)]
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


@cache
def _server() -> Any:
    """Where ranks are forked from: it has imported torch and fmoe once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _watch(ranks: Mapping[int, BaseProcess], deadline: float) -> list[int]:
    """Waits until all are done, one has failed, or the deadline; returns the ranks that run on."""
    alive = dict(ranks)
    while alive and time.time() < deadline and not any(p.exitcode for p in ranks.values()):
        wait([p.sentinel for p in alive.values()], timeout=deadline - time.time())
        alive = {rank: p for rank, p in alive.items() if p.is_alive()}
    return list(alive)


def _results(folder: Path, ranks: Mapping[int, BaseProcess], alive: list[int], what: str) -> dict[int, Any]:
    outcomes = {rank: pickle.loads(f.read_bytes()) for rank in ranks if (f := folder / f"{rank}.out").exists()}
    # one rank's failure breaks its peers' connections: the earliest is the cause
    failures = sorted((when, rank, text) for rank, (when, text, _) in outcomes.items() if text)
    if failures:
        raise RuntimeError(f"{what}: rank {failures[0][1]} failed\n{failures[0][2]}")
    # gloo's threads abort now and then while a process ends, its result long written
    dead = {rank: p.exitcode for rank, p in ranks.items() if p.exitcode and rank not in outcomes}
    if dead:
        raise RuntimeError(f"{what}: died without a traceback, exit codes by rank {dead}")
    if alive:
        stacks = "".join(f"rank {r}:\n{f.read_text()}" for r in alive if (f := folder / f"{r}.stack").exists())
        raise TimeoutError(f"{what}: ranks {alive} still ran at the time limit and were killed\n{stacks}")
    return {rank: outcomes[rank][2] for rank in ranks}


def _child(
    rank: int,
    folder: Path,
    n_ranks: int,
    deadline: float,
    waits: bool,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.update(environment)
    left = max(deadline - time.time(), 1)
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(max(left - 0.5, 0.1), file=stack)
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                "gloo", f"file://{folder}/store", timeout=timedelta(seconds=left), rank=rank, world_size=n_ranks
            )
            outcome, failed = pickle.dumps((0.0, "", function(*args))), False
            if waits:  # nobody leaves while another may still talk to it
                dist.barrier()
                dist.destroy_process_group()
        except BaseException:
            outcome, failed = pickle.dumps((time.time(), traceback.format_exc(), None)), True
        faulthandler.cancel_dump_traceback_later()
    # written aside, then moved: the parent never sees half a file
    (folder / f"{rank}.part").write_bytes(outcome)
    (folder / f"{rank}.part").rename(folder / f"{rank}.out")
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(int(failed))
