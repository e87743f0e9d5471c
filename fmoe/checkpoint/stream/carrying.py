"""The items of an engine carried out into files in the making: marked as they are done, and brought to the disk."""

from collections.abc import Callable
from concurrent.futures import Future

from fmoe.checkpoint.staging.staging import Staging
from fmoe.checkpoint.stream.carry import in_order, pool
from fmoe.checkpoint.stream.engine import Engine

SYNC = 2**30  # bytes from one wait for the disk to the next


def carry_out(stage: Staging, engine: Engine, threads: int | None, done: int, progress: Callable[[int], None]) -> None:
    """Every item that is not done yet; now and then the disk is waited for, while others go on."""
    synced, waiting = done, None
    progress(done)
    with pool(threads) as executor, pool(1) as aside:
        results = in_order(executor, engine.run, engine.items[stage.done :])
        for number, (item, _) in enumerate(results, stage.done + 1):
            stage.mark(number)
            done += item.nbytes
            progress(done)
            if done - synced > SYNC and (waiting is None or waiting.done()):
                waiting, synced = _next(waiting, aside.submit(stage.sync, number)), done
        _next(waiting, None)


def _next(before: "Future[None] | None", after: "Future[None] | None") -> "Future[None] | None":
    if before is not None:
        before.result()
    return after
