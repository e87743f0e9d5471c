"""Where a conversion's files end up: in a directory, or at an address, to which they go one by one as they are done."""

import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from fmoe.checkpoint.files.weights import JOURNAL, checkpoints, of_model
from fmoe.checkpoint.remote import kept
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.remote.targets import OPENERS, Target, here, target
from fmoe.checkpoint.remote.trouble import Unreadable
from fmoe.checkpoint.staging.beside import of_the_former, shards_below
from fmoe.checkpoint.staging.journal import ONCE, lines
from fmoe.checkpoint.staging.room import replaced
from fmoe.checkpoint.staging.staging import staging
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.stream.by_file import by_file
from fmoe.checkpoint.stream.carry import pool
from fmoe.checkpoint.stream.engine import Engine
from fmoe.layout.claims import some
from fmoe.types import AdapterError, human


class Directory:
    """Of this machine: files are made in it, under other names, until all are whole."""

    def __init__(self, dst: Path, source: Where):
        self.home, self.shown, self.source = dst, str(dst), source

    def order(self, engine: Engine, heads: Mapping[str, tuple[bytes, int]], names: Collection[str]) -> None:
        """Any order will do."""
        self.sizes = {file: size for file, (_, size) in heads.items()}

    def items(self, engine: Engine) -> Sequence[object]:
        """What else makes one work of it than its files."""
        return engine.items

    def room(self, engine: Engine) -> int:
        return sum(self.sizes.values())

    def notes(self, engine: Engine, old: Collection[str], written: Collection[str]) -> list[str]:
        return of_the_former(self.home, old, written)

    def claim(self, work: str, force: bool) -> set[str]:
        return replaced(self.home, self.source, force, work=work)

    def opening(self, work: str, force: bool, fsync: bool) -> AbstractContextManager[Staging]:
        return staging(self.home, work, lambda: self.claim(work, force), fsync=fsync)

    def begin(self, stage: Staging, heads: Mapping[str, tuple[bytes, int]], small: Collection[str]) -> None:
        stage.begin(heads, small)

    def sending(self, stage: Staging) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda done: None)

    def clean(self, stage: Staging) -> AbstractContextManager[None]:
        return nullcontext()

    def publish(self, stage: Staging) -> None:
        stage.publish()


class Outbox:
    """What is made here of a target's files. home: where, which XDG_CACHE_HOME moves; sizes: of every large file.

    rank: which of several processes this is, each of which makes and sends files of its own. whole: those that are
    there; into: the files of every item; ends: of every file that is made here, how many items are done when it is;
    cut: how the work is cut into items here, which another number of processes does otherwise.
    """

    def __init__(self, target: Target, source: Where, rank: int | None = None):
        self.target, self.shown, self.rank = target, target.shown, rank
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", target.shown)[-60:]
        name = f"{slug}-{hashlib.sha256(target.shown.encode()).hexdigest()[:12]}"
        self.homes = kept.folder() / "outbox", name
        self.home = self.homes[0] / (name if rank is None else f"{name}.{rank}")
        self.ends: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.names: Collection[str] = ()
        self.into: list[set[str]] = []
        self.whole: set[str] | None = None
        self.work = self.cut = ""
        if f"{target.shown}/".startswith(f"{source}/") or f"{source}/".startswith(f"{target.shown}/"):
            raise AdapterError(f"{target.shown} and the source {source} lie inside each other: name another address")

    def order(self, engine: Engine, heads: Mapping[str, tuple[bytes, int]], names: Collection[str]) -> None:
        """The engine's items file by file, and after how many of them each file is whole. names: of all files."""
        self.sizes, self.names = {file: size for file, (_, size) in heads.items()}, names
        if self.rank is not None:
            engine.items = [part for item in engine.items for part in by_file(engine, item)]
        number = {file: i for i, file in enumerate(heads)}
        name = lambda path: path.relative_to(self.home).as_posix().removesuffix(".part")
        into = [set(map(name, engine.files([i]))) for i in range(len(engine.items))]
        first = [min(number[file] for file in files) for files in into]
        self.take(engine, sorted(range(len(first)), key=lambda i: (first[i], i)), into, heads)

    def take(self, engine: Engine, items: Sequence[int], into: Sequence[set[str]], files: Iterable[str]) -> None:
        """These items alone, in this order, and the files that they make."""
        engine.items, self.into = [engine.items[i] for i in items], [into[i] for i in items]
        self.cut = hashlib.sha256(repr(engine.items).encode()).hexdigest()
        ends = dict.fromkeys(files, 0) | {file: i + 1 for i, names in enumerate(self.into) for file in names}
        self.ends = dict(sorted(ends.items(), key=lambda end: end[1]))

    def items(self, engine: Engine) -> Sequence[object]:
        """Nothing: of a file that is sent nobody asks how it was made."""
        return ()

    def room(self, engine: Engine) -> int:
        """Bytes of disk that are taken at once, at most: what is written and not sent, with one file on its way."""
        held = most = 0
        whole: deque[str] = deque()
        left = deque(self.ends.items())
        for i, item in enumerate(engine.items):
            held += item.nbytes
            while left and left[0][1] <= i + 1:
                whole.append(left.popleft()[0])
                held -= self.sizes[whole.popleft()] if len(whole) > 2 else 0
            most = max(most, held)
        ahead = sum(sorted((item.nbytes for item in engine.items), reverse=True)[: engine.ahead + 1])
        near = 1 if self.rank is None else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(near * (most + ahead), sum(self.sizes.values()))

    def notes(self, engine: Engine, old: Collection[str], written: Collection[str]) -> list[str]:
        gone, most = sorted(set(old) - set(written)), human(self.room(engine))
        former = [f"of the former model, removed: {some(gone)}"] if gone else []
        return [*former, f"sent file by file, by way of {self.home}: at most {most} there at once"]

    def claim(self, work: str, force: bool) -> set[str]:
        """The files of the model that is there and goes. Raises AdapterError where nothing may be written there."""
        if self.rank is None:
            replaced(self.home, None, force, work=f"{work} {self.cut}")
        begun, there = self.target.begun(), self.target.sizes().keys() - {JOURNAL}
        if begun and begun["work"] != work and not force:
            why = "another source, layout or option, or the source has changed"
            raise AdapterError(
                f"{self.target.shown} holds the beginnings of other work ({why}): force=True (--force) to start anew"
            )
        same = begun.get("work") == work
        former = {*begun["replaces"]} if same else shards_below(self.target.address)
        others, old = sorted(there - {*former, *begun["files"]} if same else there), of_model(there, former)
        if others and not force:
            fix = "name another address, or force=True (--force) to replace it"
            raise AdapterError(f"{self.target.shown} is not empty: {fix}")
        if others and not checkpoints(old):
            raise AdapterError(f"{self.target.shown} holds no checkpoint, but {some(others)}: refusing to replace that")
        return old

    def opening(self, work: str, force: bool, fsync: bool) -> AbstractContextManager[Staging]:
        resumes = self.target.resumes
        self.work, mine = work, f"{work} {self.cut}"
        claim = lambda: self.claim(work, force)
        return staging(self.home, mine if resumes else ONCE, claim, fsync=fsync, resumable=resumes)

    def ready(self, work: str, old: Collection[str]) -> set[str]:
        """The target, which says from now on that this work is on its way; the large files of it that are there."""
        if not self.target.resumes:
            return set()
        begun, there = self.target.begun(), self.target.sizes()
        if begun and begun["work"] == work:
            return {n for n, size in self.sizes.items() if there.get(n) == size}
        self.target.remove([*(n for n in OPENERS if n in old), *self.sizes])  # what bears these names now is ours
        self.target.begin({"work": work, "files": sorted(self.names), "replaces": sorted(old)})
        return set()

    def begin(self, stage: Staging, heads: Mapping[str, tuple[bytes, int]], small: Collection[str]) -> None:
        """Files in the making; what was sent before counts if it is all there."""
        whole = self.ready(self.work, stage.old) if self.whole is None else self.whole
        if not {line["sent"] for line in lines(self.home) if "sent" in line} <= whole:
            os.truncate(self.home / JOURNAL, 0)  # and so it begins anew
            whole = set() if self.whole is None else whole
        mine = heads if self.whole is None else {n: heads[n] for n in self.ends}
        stage.begin(mine, () if self.rank else small)
        stage.sent |= whole
        stage.also |= {i for i, files in enumerate(self.into) if files <= whole}

    @contextmanager
    def sending(self, stage: Staging) -> Iterator[Callable[[int], None]]:
        """A function to be told how many items are done: files that are whole are sent, one at a time, beside the work.

        On leaving all are sent.
        """
        left = deque(n for n in self.ends if n not in stage.sent)
        with pool(1) as executor:
            waiting: list[Future[None]] = []

            def after(done: int) -> None:
                while left and self.ends[left[0]] <= done:
                    if waiting:
                        waiting.pop().result()
                    waiting.append(executor.submit(self._send, stage, left.popleft()))

            after(stage.done)
            yield after
            after(max(self.ends.values(), default=0))
            for future in waiting:
                future.result()

    def _send(self, stage: Staging, name: str) -> None:
        if self.target.send(stage.part(name), name):
            stage.gone(name)

    @contextmanager
    def clean(self, stage: Staging) -> Iterator[None]:
        """Where the input turns out to be bad, nothing that was sent stays."""
        try:
            yield
        except AdapterError as error:
            if not isinstance(error, Unreadable):
                self.target.remove([*self.sizes, JOURNAL])
            raise

    def publish(self, stage: Staging) -> None:
        """All else, what opens the whole last; then the sizes of everything, and nothing is left here."""
        small = {n: stage.part(n) for n in stage.names if n not in self.sizes}
        expected = self.sizes | {n: path.stat().st_size for n, path in small.items()}
        self.target.publish(small, stage.old - expected.keys())
        there = self.target.sizes()
        if off := sorted(n for n, size in expected.items() if there.get(n) != size):
            raise Unreadable(
                f"{self.target.shown}: {some(off)} {'is' if len(off) == 1 else 'are'} not there as sent: "
                f"found {there.get(off[0], 0):,} bytes, expected {expected[off[0]]:,}: somebody else writes there"
            )
        self.target.remove([JOURNAL])
        self.gone()

    def gone(self) -> None:
        """Nothing is left here, of however many processes."""
        for home in self.homes[0].glob(f"{self.homes[1]}*"):
            shutil.rmtree(home, ignore_errors=True)


Place = Directory | Outbox


def place_of(dst: Where | str, source: Where, *, rank: int | None, checksums: bool) -> Place:
    """What a conversion writes to. Raises AdapterError where that cannot be, or not with these options."""
    found = target(dst)
    if found is None:
        return Directory(here(dst, "files"), source)
    if rank is not None and not found.resumes:
        raise AdapterError(f"{found.shown}: one process sends to the hub, in one commit. Fix: without ranks")
    if checksums:
        raise AdapterError(f"{found.shown}: checksums are those of files here. Fix: without, then `fmoe verify` it")
    return Outbox(found, source, rank)
