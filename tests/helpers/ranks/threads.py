"""Ranks that are threads of this process: `run(f, 4, x)` is [f(x) on rank 0, ..., f(x) on rank 3], in milliseconds.

Real data movement, no real processes: for many small cases. `distributed.run` is the same with processes and gloo.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded  # private: what of it is used is below


def run(function: Callable[..., Any], n_ranks: int, *args: Any, timeout: float = 60) -> list[Any]:
    """[function(*args) on each rank]. Raises what the first to fail raised, TimeoutError after `timeout` seconds."""
    store, results, failures = dist.HashStore(), [None] * n_ranks, list[BaseException]()

    def rank(me: int) -> None:
        try:
            dist.init_process_group("threaded", rank=me, world_size=n_ranks, store=store)
            results[me] = function(*args)  # the group goes with its thread: destroying it fails on torch 2.11
        except SystemExit:
            pass  # woken up since another rank has failed
        except BaseException as error:
            failures.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        ranks = [threading.Thread(target=rank, args=(me,), daemon=True) for me in range(n_ranks)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(timeout)
        if failures:
            raise failures[0]
        if any(thread.is_alive() for thread in ranks):
            raise TimeoutError(f"{function.__name__} on {n_ranks} threads still ran after {timeout} seconds")
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return results
