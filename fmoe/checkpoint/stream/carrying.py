"""The items of an engine carried out into files in the making: marked as they are done, and brought to the disk."""

from collections.abc import Callable
from concurrent.futures import Future

from fmoe.checkpoint.staging.heard import Heard
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.stream.carry import in_order, pool, threads_of
from fmoe.checkpoint.stream.engine import Engine
from fmoe.codecs.survival import Survival

SYNC = 2**30  # bytes from one wait for the disk to the next


def carry_out(
    stage: Staging,
    engine: Engine,
    threads: int | None,
    done: int,
    progress: Callable[[int], None],
    after: Callable[[int], None] = lambda items: None,
    heard: Heard | None = None,
) -> list[Survival]:
    """Every item that is not done yet; now and then the disk is waited for, while others go on.

    after: called with how many items, from the first on, are done. heard: whom changes tell; given back, with what
    those of an earlier run told.
    """
    synced, waiting, heard = done, None, heard or Heard()
    told = [*stage.heard]
    progress(done)
    with pool(threads_of(threads, engine.source.readers)) as executor, pool(1) as aside:
        left = [i for i in range(stage.done, len(engine.items)) if i not in stage.also]
        run = lambda i: heard.during(lambda: engine.run(engine.items[i]))
        for i, (found, sum_) in in_order(executor, run, left, engine.ahead):
            stage.mark(i + 1, found, sum_)
            told += found
            done += engine.items[i].nbytes
            progress(done)
            after(i + 1)
            if done - synced > SYNC and (waiting is None or waiting.done()):
                waiting, synced = _next(waiting, aside.submit(stage.sync, i + 1)), done
        _next(waiting, None)
    return told


def _next(before: "Future[None] | None", after: "Future[None] | None") -> "Future[None] | None":
    if before is not None:
        before.result()
    return after
