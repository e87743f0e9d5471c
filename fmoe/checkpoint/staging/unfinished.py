"""A checkpoint directory in the making: every file bears a `.part` name until all of them are whole, then gets its own.

A journal beside them says what is done, so that whoever is killed goes on where it stopped.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.along import copied
from fmoe.checkpoint.files.disk import naming, sized
from fmoe.checkpoint.files.weights import INDEX, JOURNAL, METADATA, OPENS, TREE, holds
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.staging.heard import heard_of, line_of
from fmoe.checkpoint.staging.journal import ONCE, boot, forgotten, lines, note, told
from fmoe.checkpoint.staging.shares import forget, shared
from fmoe.codecs.survival import Survival
from fmoe.types import AdapterError


class Staging:
    """The files of one directory, under a lock that lasts as long as the process.

    begun: whether there is something to go on with, or to remove. old: the files that these replace. done: how many
    jobs an earlier run of the same work, since interrupted, has done. also: which others ranks have done. heard: what
    the changes of all these said. sums: of what they wrote, as `stream.again` has it. sent: which files are elsewhere,
    and hold nothing here. held: whether this is still the directory, and nobody else's.
    """

    def __init__(self, path: Path, work: str, journal: int, held: Callable[[], bool], *, fresh: bool, fsync: bool):
        self.path, self.work, self.held, self.fsync = path, work, held, fsync
        self.done = 0
        self.also: set[int] = set()
        self.said: dict[int, list[Survival]] = {}
        self.sums: dict[int, int] = {}
        self.sent: set[str] = set()
        self.old: set[str] = set()
        self.names: list[str] = []
        self.sizes: dict[str, int] = {}
        self.stale: list[str] | None = None  # once they are being published: the files that they replace
        self.begun = False
        self.fresh, self._journal = fresh, journal

    @property
    def heard(self) -> list[Survival]:
        return [each for said in self.said.values() for each in said]

    def part(self, name: str) -> Path:
        """Where to write a file that gets this name in the end. Raises AdapterError where a link leads elsewhere."""
        part = self._part(name)
        for folder in [f for f in part.parents if self.path in f.parents]:
            if folder.is_symlink():
                raise AdapterError(f"{folder} is a link: fmoe writes into folders of {self.path} only: remove it")
        part.parent.mkdir(parents=True, exist_ok=True)
        return part

    def where(self, name: str) -> Path:
        """Where that file is now."""
        return self._part(name) if self._part(name).exists() else self.path / name

    def begin(self, heads: Mapping[str, tuple[bytes, int]], small: Iterable[str] = ()) -> None:
        """Files with these first bytes and sizes: those of an earlier run of the same work, or new ones.

        small: the names of all the others, which are to be written whole.
        """
        self.sizes = {name: size for name, (_, size) in heads.items()}
        self.names = [*heads, *small]
        self._names_free()
        self.begun = True
        found = lines(self.path)
        with naming(self.path / JOURNAL):
            os.write(self._journal, b"\n")  # what an interruption cut short ends here
        if found:
            self.fresh |= found[0]["fresh"]
            if found[0]["work"] == self.work != ONCE and self._resume(found):
                if self.sums:
                    self._headed(heads, "r+b")
                return
        self._discard()
        head = {"work": self.work, "files": self.names, "replaces": sorted(self.old), "fresh": self.fresh}
        self._note(boot=boot(), **head)
        self._settled([self.path / JOURNAL, self.path, *([self.path.parent] if self.fresh else [])])
        self._headed(heads, "wb")
        self._note(done=0)

    def _headed(self, heads: Mapping[str, tuple[bytes, int]], mode: str) -> None:
        """The first bytes of all files that are still in the making."""
        for name, (head_bytes, size) in heads.items() if self.stale is None else ():
            if name not in self.sent:
                with naming(self.part(name)) as part, open(part, mode) as out:
                    out.write(head_bytes)
                    out.truncate(size)

    def _resume(self, found: list[dict[str, Any]]) -> bool:
        done, stale = told(found)
        held = {n: self._part(n) for n in self.sizes} if stale is None else {n: self.where(n) for n in self.names}
        sizes = {n: sized(path) for n, path in held.items()}
        if (done is None and stale is None) or any(s < 0 or s != self.sizes.get(n, s) for n, s in sizes.items()):
            return False
        self._note(boot=boot())
        self.done, self.stale = done or 0, stale
        self.sent = {line["sent"] for line in found if "sent" in line}
        others = shared(self.path, self.work) if stale is None else {}
        self.also = {*others}
        mine = {line["done"] - 1: line for line in found if 0 < line.get("done", 0) <= self.done}
        self.said = {i: heard_of(line) for i, line in (others | mine).items()}
        self.sums = {i: line["sum"] for i, line in (others | mine).items() if "sum" in line}
        return True

    def undone(self, items: Collection[int]) -> None:
        """These are not done after all."""
        done = {*range(self.done), *self.also}.difference(items)
        self.done = min([self.done, *items])
        self.also = {i for i in done if i >= self.done}
        self.said = {i: said for i, said in self.said.items() if i not in items}

    def fill(self, name: str, given: bytes | Where) -> None:
        """A file written whole, of these bytes or as a copy."""
        self._alone()
        with naming(self.part(name)) as part:
            part.unlink(missing_ok=True)  # an earlier run's, or a link that leads elsewhere
            part.write_bytes(given) if isinstance(given, bytes) else copied(given, part)

    def mark(self, done: int, heard: Iterable[Survival] = (), sum_: int | None = None) -> None:
        """The first `done` jobs are done. heard, sum_: what the changes of the last of them said, and what it wrote."""
        self._note(done=done, **line_of(heard, sum_))

    def sync(self, done: int) -> None:
        """Wait until the disk has what the first `done` jobs wrote."""
        if self.fsync:
            self._parts_settled(self.sizes)
            self._note(synced=done)
            self._settled([self.path / JOURNAL])

    def gone(self, name: str) -> None:
        """This file is safe elsewhere: its bytes here are given up, once the journal says so."""
        self._note(sent=name)
        self._settled([self.path / JOURNAL])
        self.sent.add(name)
        os.truncate(self._part(name), 0)
        os.truncate(self._part(name), self.sizes[name])  # takes no room

    def publish(self) -> None:
        """Every file under its own name, and none of those that they replace; what opens the whole comes last."""
        self._alone()
        above = (p for n in self.names for p in (self.path / n).parents)
        folders = {self.path, *(p for p in above if p.is_relative_to(self.path))}
        if self.stale is None:
            self._whole()
            self._parts_settled(self.names)
            self._settled(folders)
            self.stale = sorted(self.old)
            self._note(publishing=self.stale, safe=self.fsync)
            self._settled([self.path / JOURNAL])
        for name in sorted(self.stale, key=lambda n: n not in OPENS):
            if name not in self.names or holds(name) and self._part(name).exists():  # else it is a new one already
                (self.path / name).unlink(missing_ok=True)
                self._emptied((self.path / name).parent)
        for name in sorted(
            self.names, key=lambda n: (n in (INDEX, METADATA, TREE), n.endswith((".safetensors", ".distcp")), n)
        ):
            if self._part(name).exists():
                os.replace(self._part(name), self.path / name)
        self._settled(folders)
        forget(self.path)
        kept = (self.path / JOURNAL).read_bytes()
        (self.path / JOURNAL).unlink()
        try:
            self._settled([self.path])
        except OSError as error:  # the same call ends it
            try:
                (self.path / JOURNAL).write_bytes(kept)
            except OSError:
                error.strerror = f"{error.strerror}, when all files had their names: they are whole"
            raise

    def _whole(self) -> None:
        """Raises AdapterError where a file that was made is gone, or another."""
        for part, size in ((self._part(n), self.sizes.get(n)) for n in self.names):
            if sized(part) < 0 or size not in (None, sized(part)):
                raise AdapterError(f"{part} is gone, or not as it was made: nothing else may write to it; run again")

    def _emptied(self, folder: Path) -> None:
        """Folders of the former model go with their last file."""
        with suppress(OSError):
            for empty in [f for f in (folder, *folder.parents) if self.path in f.parents]:
                empty.rmdir()

    def abandon(self) -> None:
        """Nothing of this work is left; all of other work is."""
        if self.begun:
            self._discard()
        if self.begun or not lines(self.path):
            (self.path / JOURNAL).unlink(missing_ok=True)

    def _names_free(self) -> None:
        """Raises AdapterError where a folder has the name of a file to come, or will have, or two files have one."""
        files = {JOURNAL, *self.names, *(f"{n}.part" for n in self.names)}
        if both := sorted(files & {p.as_posix() for n in self.names for p in Path(n).parents}):
            text = f"{self.path / both[0]} would be a file, and a folder of others"
            raise AdapterError(f"{text}: rename one of them in the source")
        ours = [p for n in self.names for p in (self.path / n, self._part(n))]
        for path in (*ours, *self.path.glob("*.safetensors.part")):
            if path.is_dir() and not path.is_symlink():
                raise AdapterError(f"{path} is a folder, expected no more than a file of that name: move it away")
        alike: dict[str, list[str]] = {}
        for name in self.names:
            alike.setdefault(name.casefold(), []).append(name)
        if (self.path / JOURNAL.upper()).exists() and (twins := next((n for n in alike.values() if len(n) > 1), None)):
            text = f"{' and '.join(map(repr, twins))} are one name to the file system of {self.path}"
            raise AdapterError(f"{text}: rename one of them in the source, or write to another")

    def _part(self, name: str) -> Path:
        return self.path / f"{name}.part"

    def _note(self, **line: Any) -> None:
        self._alone()
        with naming(self.path / JOURNAL):
            note(self._journal, **line)

    def _alone(self) -> None:
        if not self.held():
            text = "was moved, or another process has taken it over while this one stood still for a minute or more"
            raise AdapterError(f"{self.path} {text}: let that end, then run this again")

    def _discard(self) -> None:
        """No part of this work, of what the journal tells of, or of weights at all."""
        forget(self.path)
        names = {*self.names, *(n for line in lines(self.path)[:1] for n in line["files"])}
        for part in {*(self.path / f"{n}.part" for n in names), *self.path.glob("*.safetensors.part")}:
            part.unlink(missing_ok=True)

    def _parts_settled(self, names: Iterable[str]) -> None:
        try:
            self._settled(map(self._part, names))
        except OSError:  # what was on its way is lost, and the system says so but once
            forgotten(lambda: self._note(boot=""), map(self._part, names))
            raise

    def _settled(self, paths: Iterable[Path]) -> None:
        """Wait until the disk has them."""
        for path in paths if self.fsync else ():
            with naming(path):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
