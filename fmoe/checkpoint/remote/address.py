"""A folder or a file of another machine, which is asked for as a path is: `address / "config.json"`, read by ranges."""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from fmoe.checkpoint.remote import stores
from fmoe.checkpoint.remote.hub import Hub
from fmoe.checkpoint.remote.trouble import Trouble, retried
from fmoe.checkpoint.remote.web import Facts
from fmoe.types import AdapterError, brief

_NOTHING = re.compile(r"[a-z][a-z0-9+.-]*://[/\s]*", re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.+", re.IGNORECASE)
PIECE = 16 * 2**20  # bytes that are asked for at once
LONGEST = "model-00001-of-00001.safetensors.part"  # of the names of files that are written


@dataclass
class Known:
    """What was asked already of one folder. requests, received: how many, and bytes that came."""

    names: list[str] | None = None
    facts: dict[str, Facts | None] = field(default_factory=dict)
    requests: int = 0
    received: int = 0
    lock: Lock = field(default_factory=Lock, repr=False)


@dataclass(frozen=True, eq=False)
class Address:
    """What is at `name` in a store; the folder itself where name is empty. str() of it has no secrets."""

    store: stores.Store
    name: str = ""
    known: Known = field(default_factory=Known, repr=False)

    def __truediv__(self, name: "str | Path") -> "Address":
        return Address(self.store, f"{self.name}/{name}".lstrip("/"), self.known)

    def __str__(self) -> str:
        return f"{self.store.shown}/{self.name}".rstrip("/")

    def __fspath__(self) -> str:
        raise AdapterError(f"{self} is no file of this machine: fetch it first")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def parent(self) -> "Address":
        return Address(self.store, self.name.rpartition("/")[0], self.known)

    def resolve(self) -> "Address":
        return self

    @property
    def listed(self) -> bool:
        """Whether names() are all that there are."""
        return self.store.listed

    def names(self) -> list[str]:
        """The files below, relative to the folder. Raises AdapterError."""
        if self.known.names is None:
            self.known.names = retried(str(self), self.store.names)
        return self.known.names

    def facts(self, *, again: bool = False) -> Facts | None:
        """Size and tag of the file; None where there is none. again: as it is now."""
        if again or self.name not in self.known.facts:
            found = retried(str(self), lambda: self.store.facts(self.name))
            with self.known.lock:
                self.known.facts[self.name] = found
        return self.known.facts[self.name]

    def exists(self) -> bool:
        return self.facts() is not None

    @property
    def size(self) -> int:
        found = self.facts()
        return found.size if found else 0

    def read_at(self, into: memoryview, at: int) -> None:
        """into = the bytes from at on, in pieces, each tried again from where it broke off. Raises AdapterError."""
        for start in range(0, len(into), PIECE):
            self._piece(into[start : start + PIECE], at + start)

    def _piece(self, into: memoryview, at: int) -> None:
        done = 0

        def attempt() -> None:
            nonlocal done
            try:
                self._count(requests=1)
                self.store.read(self.name, into[done:], at + done)
                self._count(received=len(into) - done)
            except Trouble as trouble:
                done += trouble.done
                self._count(received=trouble.done)
                raise

        retried(f"{self} bytes {at:,} to {at + len(into):,}", attempt)

    def _count(self, requests: int = 0, received: int = 0) -> None:
        with self.known.lock:
            self.known.requests += requests
            self.known.received += received

    def blocks(self, size: int = 2**20) -> Iterator[bytes]:
        """All of the file, a little at a time."""
        for at in range(0, self.size, size):
            block = bytearray(min(size, self.size - at))
            self.read_at(memoryview(block), at)
            yield bytes(block)


Where = Path | Address


def place(path: object) -> None:
    """Raises AdapterError for what is no path and no address, and for a path too long to hold files.

    >>> place(3)
    Traceback (most recent call last):
    fmoe.types.AdapterError: 3: expected the path of a directory, or an address
    """
    if not isinstance(path, str | Path | Address):
        raise AdapterError(f"{brief(path)}: expected the path of a directory, or an address")
    if isinstance(path, str) and (not path or _NOTHING.fullmatch(path)):
        raise AdapterError(f"{path!r}: nothing is named, expected the path of a directory, or an address")
    if isinstance(path, Address) or (found := _URL.fullmatch(str(path))) and found[1].lower() != "file":
        return
    try:
        os.lstat(Path(stores.local(str(path)) or path, LONGEST))
    except ValueError:  # as with a NUL
        raise AdapterError(f"{brief(path)}: no file of this system can have this name, expected a path") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise AdapterError(
                f"{brief(path)}: a path of {len(str(path))} characters, expected a shorter one"
            ) from None


def where(path: "Where | str") -> Where:
    """A path of this machine, or an address, by what is written. Raises AdapterError for one that nobody can open.

    >>> where("a/b"), where("file:///a/b")
    (PosixPath('a/b'), PosixPath('/a/b'))
    """
    place(path)
    if isinstance(path, Path | Address) or not (found := _URL.fullmatch(path)):
        return path if isinstance(path, Address) else Path(path)
    scheme = found[1].lower()
    if scheme == "file":
        return stores.local(path) or Path(path)
    if scheme == "hf":
        hub = Hub(path)
        return hub.snapshot() or Address(hub)
    return Address(stores.Web(path) if scheme in ("http", "https") else stores.Driven(path))


def look(root: Address, names: list[str]) -> None:
    """What these files are is asked for in parallel."""
    root.known.facts |= stores.all_facts(root.store, [n for n in names if n not in root.known.facts])
