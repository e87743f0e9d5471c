"""One conversion by several processes: the first makes the files and publishes them, each carries its share."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fmoe.checkpoint.files.disk import naming
from fmoe.checkpoint.remote.ranks import Ranks, share, together
from fmoe.checkpoint.remote.trouble import Unreadable
from fmoe.checkpoint.staging.failed import failures
from fmoe.checkpoint.staging.heard import Heard
from fmoe.checkpoint.staging.journal import forgotten
from fmoe.checkpoint.staging.shares import Share
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.stream.again import again
from fmoe.checkpoint.stream.carry import in_order, pool, threads_of, threads_of_rank
from fmoe.checkpoint.stream.engine import Engine
from fmoe.codecs.survival import Survival
from fmoe.types import AdapterError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SYNC = 2**30  # bytes of one rank from one wait for the disk to the next


class Done(NamedTuple):
    """Of all ranks. resumed: bytes that an earlier run had written."""

    resumed: int
    read: int
    written: int
    sums: dict[str, str]


class Rank(NamedTuple):
    """What carrying a share asks for besides the share."""

    dst: Path
    work: str
    threads: int | None
    fsync: bool
    force: bool


def in_ranks(
    group: "ProcessGroup",
    engine: Engine,
    how: Rank,
    heard: Heard,
    opening: Callable[[], AbstractContextManager[Staging]],
    begin: Callable[[Staging], None],
    finish: Callable[[Staging, list[Survival]], dict[str, str]],
    progress: Callable[[int], None],
) -> Done:
    """The work of an engine, by all ranks of a group, which all call this; the first alone opens, begins, finishes.

    heard: whom changes tell; `finish` gets what those of all ranks told, and those of an earlier run.
    Raises AdapterError on all ranks where one of them fails or ends; the same call goes on, with any number of ranks.
    """
    with together(group) as ranks, failures(), ExitStack() as stack:
        agreed(ranks, how.work)
        stage = stack.enter_context(opening()) if ranks.first else None
        if stage is not None:
            begin(stage)
            again(stage, engine)
        todo = ranks.tell(_left(stage, engine) if stage else None)
        resumed = sum(item.nbytes for item in engine.items) - sum(engine.items[i].nbytes for i in todo)
        shown = (lambda done: progress(resumed + done)) if ranks.first else lambda done: None
        shown(0)
        mine = _carry(ranks, engine, todo, how, heard, shown) + (stage.heard if stage else [])
        read, written = map(sum, zip(*ranks.gather((engine.read, engine.written)), strict=True))
        told = [each for found in ranks.gather(mine) for each in found]
        return Done(resumed, read, written, ended(ranks, finish(stage, told) if stage else None))


def agreed(ranks: Ranks, work: str) -> None:
    """Raises AdapterError where the ranks are not about the same work."""
    if len(set(ranks.gather(work))) > 1:
        raise AdapterError("the ranks do not see the same source and options: expected the same on all")


def ended(ranks: Ranks, sums: dict[str, str] | None) -> dict[str, str]:
    """What the first has come to in the end, to all."""
    try:
        told: dict[str, str] = ranks.tell(sums)
    except Unreadable:  # whoever has ended since has done its share
        if sums is None:
            raise
        return sums
    return told


def _left(stage: Staging, engine: Engine) -> list[int]:
    if stage.stale is not None:  # all that is left is to give the files their names
        return []
    return [i for i in range(stage.done, len(engine.items)) if i not in stage.also]


def _carry(
    ranks: Ranks, engine: Engine, todo: Sequence[int], how: Rank, heard: Heard, shown: Callable[[int], None]
) -> list[Survival]:
    """This rank's share of the items; what their changes told."""
    mine = [todo[k] for k in share([engine.items[i].nbytes for i in todo], ranks.world)[ranks.rank]]
    told = list[Survival]()
    if not todo:
        return told
    journal = Share(how.dst, ranks.rank, how.work)
    done, since, waiting, most = 0, 0, list[int](), 0
    try:
        with pool(threads_of(how.threads, engine.source.readers, threads_of_rank())) as executor:
            run = lambda i: heard.during(lambda: engine.run(engine.items[i]))
            for i, (found, sum_) in in_order(executor, run, mine, engine.ahead):
                journal.mark(i, found, sum_)
                told += found
                waiting.append(i)
                done += engine.items[i].nbytes
                most = max(most, ranks.done(done))
                shown(most)
                if done - since > SYNC:
                    _settle(engine, journal, waiting, how.fsync)
                    waiting, since = [], done
        _settle(engine, journal, waiting, how.fsync)
    finally:
        journal.close()
    return told


def _settle(engine: Engine, journal: Share, items: Sequence[int], fsync: bool) -> None:
    """Waits until the disk has what these items wrote."""
    if not fsync or not items:
        return
    try:
        for path in engine.files(items):
            with naming(path), open(path, "rb") as file:
                os.fsync(file.fileno())
    except OSError:
        forgotten(journal.lost, engine.files(items))
        raise
    journal.synced(items)
