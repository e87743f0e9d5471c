"""One conversion to an address by several processes: each makes files of its own and sends them, the first opens all.

Nothing that a process has on its disk is another's: they may be of machines that share no file system.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from fmoe.checkpoint.remote.ranks import Ranks, share, together
from fmoe.checkpoint.sending import Outbox
from fmoe.checkpoint.staging.failed import failures
from fmoe.checkpoint.staging.heard import Heard
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.stream.again import again
from fmoe.checkpoint.stream.carry import threads_of, threads_of_rank
from fmoe.checkpoint.stream.carrying import carry_out
from fmoe.checkpoint.stream.engine import Engine
from fmoe.checkpoint.together import Done, Rank, agreed, ended
from fmoe.codecs.survival import Survival

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def in_ranks_apart(
    place: Outbox,
    group: "ProcessGroup",
    engine: Engine,
    how: Rank,
    heard: Heard,
    opening: Callable[[], AbstractContextManager[Staging]],
    begin: Callable[[Staging], None],
    finish: Callable[[Staging, list[Survival]], dict[str, str]],
    progress: Callable[[int], None],
) -> Done:
    """As `in_ranks`, to an address: whole files are shared out, by bytes, and what is sent is not sent again.

    A file that was in the making goes on if the same rank makes the same files, as the same number of ranks do that
    were stopped before any file was sent; else it is made anew.
    """
    with together(group) as ranks, failures(), ExitStack() as stack:
        agreed(ranks, how.work)
        place.whole = ranks.tell(place.ready(how.work, place.claim(how.work, how.force)) if ranks.first else None)
        there = sum(i.nbytes for i, into in zip(engine.items, place.into, strict=True) if into <= place.whole)
        _mine(ranks, engine, place, place.whole)
        stage = stack.enter_context(opening())
        stack.enter_context(place.clean(stage))
        begin(stage)
        again(stage, engine)
        had = sum(engine.items[i].nbytes for i in {*range(stage.done), *stage.also})
        resumed = there + sum(ranks.gather(had))

        def shown(done: int) -> None:
            most = ranks.done(done - had)
            if ranks.first:
                progress(resumed + most)

        with place.sending(stage) as sent:
            threads = threads_of(how.threads, engine.source.readers, threads_of_rank())
            mine = carry_out(stage, engine, threads, had, shown, sent, heard)
        read, written = map(sum, zip(*ranks.gather((engine.read, engine.written)), strict=True))
        told = [each for found in ranks.gather(mine) for each in found]
        sums = ended(ranks, finish(stage, told) if ranks.first else None)
        place.gone()
        return Done(resumed, read, written, sums)


def _mine(ranks: Ranks, engine: Engine, place: Outbox, whole: Collection[str]) -> None:
    """This rank's items, those of its share of the files that are not there."""
    left = [file for file in place.ends if file not in whole]
    mine = [left[k] for k in share([place.sizes[file] for file in left], ranks.world)[ranks.rank]]
    items = [i for i, into in enumerate(place.into) if into <= {*mine}]
    place.take(engine, items, place.into, mine)
