"""Where files are sent: a folder of whatever fsspec has a driver for, or a repository of the hub, in one commit."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fmoe.checkpoint.remote.address import Address, Where, place
from fmoe.checkpoint.remote.hub import Hub, trouble_of
from fmoe.checkpoint.remote.stores import Driven, local
from fmoe.checkpoint.remote.trouble import Trouble, Unreadable, retried, shown
from fmoe.types import AdapterError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.IGNORECASE)
OPENERS = ("model.safetensors.index.json", "fmoe.json", "config.json")
"""Without these nobody takes a folder for a checkpoint: they are sent last."""
JOURNAL = "fmoe.journal"
"""With this nobody takes a folder for a whole one."""


class Target(Protocol):
    """shown: its address, as messages may have it. resumes: whether what was sent stays there without a publication.

    address: to read what is there.
    """

    shown: str
    address: Address
    resumes: bool

    def sizes(self) -> dict[str, int]:
        """Every file that is there, as of now."""

    def begun(self) -> dict[str, Any]:
        """The work that is on its way there, as `begin` has said it; empty where none is."""

    def begin(self, said: Mapping[str, Any]) -> None:
        """Whoever looks knows of this work, until JOURNAL is removed."""

    def remove(self, names: Iterable[str]) -> None:
        """Files that are there, if they are."""

    def send(self, path: Path, name: str) -> bool:
        """One large file; whether it is all there now, so that path is needed no more. Raises AdapterError."""

    def publish(self, files: Mapping[str, Path], old: Iterable[str]) -> None:
        """All else; `old` goes, and whoever looks sees the whole. Raises AdapterError."""


class Folder:
    """s3://bucket/folder, gs://, abfs://, sftp:// ...: each file under its own name at once, OPENERS last."""

    resumes = True

    def __init__(self, url: str):
        self.store = Driven(url)
        self.shown, self.address = self.store.shown, Address(self.store)

    def sizes(self) -> dict[str, int]:
        def look() -> dict[str, int]:
            self.store.fs.invalidate_cache()
            found = self.store.call(lambda: self.store.fs.find(self.store.root, detail=True))
            return {str(p)[len(self.store.root) :].lstrip("/"): int(facts["size"]) for p, facts in found.items()}

        return retried(self.shown, look)

    def begun(self) -> dict[str, Any]:
        found = self.store.facts(JOURNAL)
        if found is None:
            return {}
        text = retried(
            f"{self.shown}/{JOURNAL}", lambda: self.store.call(partial(self.store.fs.cat_file, self._journal))
        )
        with suppress(ValueError):
            said = json.loads(text)
            if isinstance(said, dict) and said.keys() == {"work", "files", "replaces"}:
                return said
        raise AdapterError(f"{self.shown}/{JOURNAL} is none of fmoe's: remove it")

    def begin(self, said: Mapping[str, Any]) -> None:
        data = json.dumps(said).encode()
        write = partial(self.store.fs.pipe_file, self._journal, data)
        retried(f"{self.shown}/{JOURNAL}, which is being sent", lambda: self.store.call(write))

    @property
    def _journal(self) -> str:
        return f"{self.store.root}/{JOURNAL}"

    def remove(self, names: Iterable[str]) -> None:
        there = self.sizes()
        for name in (n for n in names if n in there):
            retried(f"{self.shown}/{name}", partial(self.store.call, partial(self._gone, name)))

    def _gone(self, name: str) -> None:
        self.store.fs.rm_file(f"{self.store.root}/{name}")

    def send(self, path: Path, name: str) -> bool:
        size = path.stat().st_size

        def attempt() -> None:
            self.store.call(lambda: self.store.fs.put_file(str(path), f"{self.store.root}/{name}"))
            found = self.store.facts(name)
            if found is None or found.size != size:
                there = "nothing" if found is None else f"{found.size:,} bytes"
                raise Trouble(f"{there} arrived, expected {size:,}", again=True)

        retried(f"{self.shown}/{name}, which is being sent", attempt)
        return True

    def publish(self, files: Mapping[str, Path], old: Iterable[str]) -> None:
        self.remove(old)
        for name in sorted(files, key=lambda n: (n in OPENERS and 1 + OPENERS.index(n), n)):
            self.send(files[name], name)


class Repository:
    """hf://org/name[@revision][/folder]: files are uploaded one by one, and one commit makes them the checkpoint."""

    resumes = False

    def __init__(self, url: str):
        self.of = Hub(url)
        self.shown, self.address, self.api = self.of.shown, Address(self.of), self.of.hub.HfApi()
        if self.of.hub.constants.is_offline_mode():
            raise AdapterError(f"{self.shown}: nothing can be sent, HF_HUB_OFFLINE is set: unset it")
        self.added: list[Any] = []

    def sizes(self) -> dict[str, int]:
        how = {"revision": self.of.revision, "files_metadata": True}
        try:
            found = self._call("", lambda: self.api.model_info(self.of.repo, **how))
        except Unreadable as error:
            if "status 404" not in str(error):
                raise
            raise AdapterError(f"{error}: create it first, as by `hf repo create {self.of.repo}`") from None
        names = {entry.rfilename: int(entry.size or 0) for entry in found.siblings or ()}
        inside = {n[len(self.of.folder) :]: size for n, size in names.items() if n.startswith(self.of.folder)}
        return {n: size for n, size in inside.items() if n != ".gitattributes"}  # which the hub makes itself

    def begun(self) -> dict[str, Any]:
        return {}

    def begin(self, said: Mapping[str, Any]) -> None:
        """Nothing: nobody sees what is no commit yet."""

    def remove(self, names: Iterable[str]) -> None:
        """Nothing: it is part of the commit."""

    def send(self, path: Path, name: str) -> bool:
        add = self.of.hub.CommitOperationAdd(path_in_repo=self.of.folder + name, path_or_fileobj=str(path))
        how = {"additions": [add], "revision": self.of.revision}
        self._call(name, lambda: self.api.preupload_lfs_files(self.of.repo, **how))
        self.added.append(add)
        return bool(getattr(add, "_is_uploaded", False))  # what is no large file to the hub goes with the commit

    def publish(self, files: Mapping[str, Path], old: Iterable[str]) -> None:
        make, gone = self.of.hub.CommitOperationAdd, self.of.hub.CommitOperationDelete
        small = [make(path_in_repo=self.of.folder + n, path_or_fileobj=str(path)) for n, path in files.items()]
        operations = [*self.added, *small, *(gone(path_in_repo=self.of.folder + n) for n in sorted(old))]
        how = {"commit_message": "Checkpoint by fmoe convert", "revision": self.of.revision}
        self._call("", lambda: self.api.create_commit(self.of.repo, operations, **how))

    def _call(self, name: str, call: Any) -> Any:
        def attempt() -> Any:
            try:
                with _silent(self.of.hub.utils):
                    return call()
            except Exception as error:
                raise trouble_of(error) from None

        return retried(f"{self.shown}/{name}".rstrip("/"), attempt)


@contextmanager
def _silent(utils: Any) -> Iterator[None]:
    """Without huggingface_hub's progress bars: ours is there, or none is wanted."""
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def target(dst: Where | str) -> Target | None:
    """What takes files at this address; None for a directory of this machine. Raises AdapterError for what takes none.

    >>> target("a/b") is None
    True
    """
    place(dst)
    if isinstance(dst, Address):
        dst = str(dst)
    if isinstance(dst, os.PathLike) or not (found := _URL.fullmatch(dst)) or found[1].lower() == "file":
        return None
    scheme = found[1].lower()
    if scheme in ("http", "https"):
        raise AdapterError(f"{shown(dst)}: a web server takes no files: name a directory, s3://... or hf://ORG/NAME")
    return Repository(dst) if scheme == "hf" else Folder(dst)


def here(dst: Where | str, what: str) -> Path:
    """dst as a directory of this machine, to which `what` goes. Raises AdapterError where it is an address."""
    place(dst)
    if isinstance(dst, Address) or isinstance(dst, str) and (found := _URL.fullmatch(dst)) and found[1] != "file":
        raise AdapterError(f"{shown(str(dst))} is an address, and {what} go to a directory of this machine: name one")
    return local(str(dst)) or Path(dst)
