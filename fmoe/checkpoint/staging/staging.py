"""A checkpoint directory to be filled: locked, then left as it was, as it shall be, or with what going on takes."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fmoe.checkpoint.files.disk import Unreadable
from fmoe.checkpoint.files.weights import JOURNAL
from fmoe.checkpoint.staging.failed import failures
from fmoe.checkpoint.staging.journal import opened
from fmoe.checkpoint.staging.locks import locked
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.types import AdapterError


@contextmanager
def staging(
    path: Path, work: str, claim: Callable[[], set[str]], *, fsync: bool = True, resumable: bool = True
) -> Iterator[Staging]:
    """The directory, made if need be and locked, to be filled. Interrupted, it keeps what is needed to go on.

    claim: what may be replaced in it, asked once nobody else writes to it (see `room.replaced`). Raises AdapterError
    where another process is at it, and `Failed` where the system does. Bad input, which is an AdapterError inside,
    leaves nothing behind (but a source that cannot be read just now is not bad), and nor does any end but a good one of
    what is not resumable, unless files have their names already.
    """
    with failures(), _filled(path, work, claim, fsync, resumable) as stage:
        yield stage


@contextmanager
def _filled(path: Path, work: str, claim: Callable[[], set[str]], fsync: bool, resumable: bool) -> Iterator[Staging]:
    fresh = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(path) as (journal, held):
            stage = Staging(path, work, journal, held, fresh=fresh, fsync=fsync)
            try:
                stage.old = claim()
                yield stage
                fresh = False
            except BaseException as error:
                ours = held()
                fresh = stage.fresh and ours
                wrong = isinstance(error, AdapterError) and not isinstance(error, Unreadable)
                bad = wrong or not resumable
                if stage.stale is None and (bad or not stage.begun) and ours:
                    with suppress(OSError):  # what is left then is unfinished, and why is what has gone wrong first
                        stage.abandon()
                raise
    finally:
        if fresh and not (path / JOURNAL).exists():
            _prune(path)


@contextmanager
def _alone(path: Path) -> Iterator[tuple[int, Callable[[], bool]]]:
    """The journal, and as `locked`; where no lock is to be had, one that nobody has written to does not stay behind."""
    journal = opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    with ExitStack() as stack:
        stack.callback(os.close, journal)
        try:
            held = stack.enter_context(locked(path, journal))
        except OSError:
            if not os.fstat(journal).st_size:
                (path / JOURNAL).unlink(missing_ok=True)
            raise
        yield journal, held


def _prune(path: Path) -> None:
    """The empty directories of path, and path itself if it is one."""
    for folder in (*sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True), path):
        with suppress(OSError):
            folder.rmdir()
