"""Where a conversion's files end up: in a directory, or at an address, to which they go one by one as they are done."""

import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from fmoe.checkpoint.files.weights import JOURNAL, holds, of_model
from fmoe.checkpoint.remote import kept
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.remote.targets import OPENERS, Target, here, target
from fmoe.checkpoint.remote.trouble import Unreadable
from fmoe.checkpoint.staging.beside import of_the_former
from fmoe.checkpoint.staging.journal import ONCE, lines
from fmoe.checkpoint.staging.room import replaced
from fmoe.checkpoint.staging.staging import Staging, staging
from fmoe.checkpoint.stream.carry import pool
from fmoe.checkpoint.stream.engine import Engine
from fmoe.layout.claims import some
from fmoe.types import AdapterError, human


class Directory:
    """Of this machine: files are made in it, under other names, until all are whole."""

    def __init__(self, dst: Path, source: Where):
        self.home, self.shown, self.source = dst, str(dst), source

    def order(self, engine: Engine, heads: Mapping[str, tuple[bytes, int]]) -> None:
        """Any order will do."""
        self.sizes = {file: size for file, (_, size) in heads.items()}

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
    """What is made here of a target's files. home: where, which XDG_CACHE_HOME moves; sizes: of every large file."""

    def __init__(self, target: Target, source: Where):
        self.target, self.shown = target, target.shown
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", target.shown)[-60:]
        self.home = kept.folder() / "outbox" / f"{slug}-{hashlib.sha256(target.shown.encode()).hexdigest()[:12]}"
        self.ends: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        if f"{target.shown}/".startswith(f"{source}/") or f"{source}/".startswith(f"{target.shown}/"):
            raise AdapterError(f"{target.shown} and the source {source} lie inside each other: name another address")

    def order(self, engine: Engine, heads: Mapping[str, tuple[bytes, int]]) -> None:
        """The engine's items file by file, and after how many of them each file is whole."""
        number = {self.home / f"{file}.part": i for i, file in enumerate(heads)}
        first = [min(number[p] for p in engine.files([i])) for i in range(len(engine.items))]
        engine.items = [engine.items[i] for i in sorted(range(len(first)), key=lambda i: (first[i], i))]
        ends = [0] * len(number)
        for i in range(len(engine.items)):
            for path in engine.files([i]):
                ends[number[path]] = i + 1
        self.sizes = {file: size for file, (_, size) in heads.items()}
        self.ends = dict(sorted(zip(heads, ends, strict=True), key=lambda end: end[1]))

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
        return min(most + ahead, sum(self.sizes.values()))

    def notes(self, engine: Engine, old: Collection[str], written: Collection[str]) -> list[str]:
        most = human(self.room(engine))
        gone = sorted(set(old) - set(written))
        former = [f"of the former model, removed: {some(gone)}"] if gone else []
        return [*former, f"sent file by file, by way of {self.home}: at most {most} there at once"]

    def claim(self, work: str, force: bool) -> set[str]:
        """The files of the model that is there and goes. Raises AdapterError where nothing may be written there."""
        replaced(self.home, None, force, work=work)
        begun = lines(self.home)[:1] if self.home.exists() else []
        ours = {*begun[0]["files"], *begun[0]["replaces"]} if begun and begun[0]["work"] == work else set[str]()
        there = self.target.sizes().keys()
        others, old = sorted(there - ours), of_model(there)
        if others and not force:
            raise AdapterError(
                f"{self.target.shown} is not empty: name another address, or force=True (--force) to replace it"
            )
        if others and not any(map(holds, old)):
            raise AdapterError(f"{self.target.shown} holds no checkpoint, but {some(others)}: refusing to replace that")
        return old

    def opening(self, work: str, force: bool, fsync: bool) -> AbstractContextManager[Staging]:
        resumes = self.target.resumes
        claim = lambda: self.claim(work, force)
        return staging(self.home, work if resumes else ONCE, claim, fsync=fsync, resumable=resumes)

    def begin(self, stage: Staging, heads: Mapping[str, tuple[bytes, int]], small: Collection[str]) -> None:
        """Files in the making; what was sent before counts if it is all there."""
        there = self.target.sizes()
        sent = {line["sent"] for line in lines(self.home) if "sent" in line}
        if any(there.get(n) != self.sizes.get(n) for n in sent):
            os.truncate(self.home / JOURNAL, 0)  # and so it begins anew
        stage.begin(heads, small)
        self.target.remove(n for n in OPENERS if n in stage.old)

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
                self.target.remove(stage.sent)
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
        shutil.rmtree(self.home, ignore_errors=True)


Place = Directory | Outbox


def place_of(dst: Where | str, source: Where, *, ranks: bool, checksums: bool) -> Place:
    """What a conversion writes to. Raises AdapterError where that cannot be, or not with these options."""
    found = target(dst)
    if found is None:
        return Directory(here(dst, "files"), source)
    if ranks:
        raise AdapterError(f"{found.shown}: one process sends to an address. Fix: without ranks")
    if checksums:
        raise AdapterError(f"{found.shown}: checksums are those of files here. Fix: without, then `fmoe verify` it")
    return Outbox(found, source)
