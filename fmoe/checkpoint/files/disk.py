"""Files that somebody else wrote: which of them may be opened, and bytes read from them whole or not at all.

A file is a regular one (a pipe would wait, a device has no end), lies in the directory that was asked for, and is at
each reading the one that it was when its header was read. Everything else is an AdapterError naming the file.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

from fmoe.checkpoint.remote.address import Address, Where
from fmoe.checkpoint.remote.trouble import Unreadable
from fmoe.checkpoint.remote.web import Facts
from fmoe.types import AdapterError

Opened = int | Address
AGAIN = "download or copy it again"
GONE = "is not there any more: nothing else may write to it; run again"


class Stamp(NamedTuple):
    """What a file was when it was opened: another file, size or time of writing later on means other bytes.

    written: what anybody may set back (tar and rsync do). changed: what the system alone sets. tag: what a server
    says instead of all that.
    """

    device: int = 0
    inode: int = 0
    size: int = 0
    written: int = 0
    changed: int = 0
    tag: str = ""

    @classmethod
    def of(cls, descriptor: Opened) -> "Stamp":
        if isinstance(descriptor, Address):
            return cls(size=descriptor.size, tag=(descriptor.facts() or Facts(0, "")).tag)
        return cls.said(os.fstat(descriptor))

    @classmethod
    def said(cls, found: os.stat_result) -> "Stamp":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def identity(path: Where, stamp: Stamp) -> list[int | str]:
    """What tells this file from any other that ever lies at path; where the file system has nothing, its digest."""
    if isinstance(path, Address):
        return [stamp.size, stamp.tag or os.urandom(8).hex()]  # what cannot be told is never the same
    if not weak(stamp):
        return [stamp.inode, stamp.size, stamp.written, stamp.changed]
    return [stamp.size, digest(path, stamp)]


def identities(root: Where, stamps: Mapping[str, Stamp], alone: bool = True) -> dict[str, list[int | str]]:
    """`identity` of each of these files of a directory.

    Raises AdapterError, unless this process is alone, for a file of which nothing tells several that it is the same.
    """
    untold = [file for file, stamp in stamps.items() if isinstance(root, Address) and not stamp.tag]
    if untold and not alone:
        raise AdapterError(
            f"{root / untold[0]}: found neither ETag nor Last-Modified in the server's answers, expected one, by which "
            "ranks know that they read the same bytes. Convert in one process, or copy the files here first"
        )
    return {file: identity(root / file, stamp) for file, stamp in stamps.items()}


def marks(files: Mapping[str, bytes | Where]) -> dict[str, object]:
    """What tells each of these files, which are copied whole, from any other of its name, as `identity` does."""
    of = lambda f: [*(f.facts() or ())] if isinstance(f, Address) else identity(f, Stamp.said(os.stat(f)))
    return {n: hashlib.sha256(f).hexdigest() if isinstance(f, bytes) else of(f) for n, f in files.items()}


def weak(stamp: Stamp) -> bool:
    """Whether nothing but its bytes tells a file of this machine from another of that size."""
    return not (stamp.inode and stamp.changed)


def digest(path: Where, stamp: Stamp | None = None) -> str:
    """sha256 of a whole file."""
    if isinstance(path, Address):
        found = hashlib.sha256()
        for block in path.blocks():
            found.update(block)
        return found.hexdigest()
    with linked(path, stamp) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(path: Where) -> int:
    if isinstance(path, Address):
        return path.size
    with linked(path) as file:
        return os.fstat(file).st_size


def sized(path: Path) -> int:
    """Bytes of a file of this machine; -1 where there is none, but a link, a folder or nothing."""
    try:
        found = os.lstat(path)
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


@contextmanager
def linked(path: Path, was: Stamp | None = None) -> Iterator[int]:
    """A descriptor of the file there, whichever links lead to it: they were looked at when it was found."""
    with reading(Path(os.path.realpath(path)), was, missing=GONE) as file:
        yield cast(int, file)


@contextmanager
def reading(
    path: Where,
    was: Stamp | None = None,
    missing: str = "is not there",
    *,
    parts: bool = False,
    root: Path | None = None,
) -> Iterator[Opened]:
    """A descriptor of the regular file at path; was: and still the one of that stamp. missing: said if not.

    parts: what lies between them is not read ahead. root: the directory that was asked for, if not the one it lies in.

    Never waits. Raises AdapterError where there is none, where a link leads out of the directory, where it may not be
    read, or where it has changed.
    """
    if isinstance(path, Address):
        if not path.exists():
            raise AdapterError(f"{path} {missing}")
        yield path
        return
    try:
        descriptor = _open(path, root or path.parent, was)
    except FileNotFoundError:
        raise AdapterError(f"{path} {missing}") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    try:
        unchanged(path, descriptor, was)
        if parts:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def unchanged(path: Where, descriptor: Opened, was: Stamp | None) -> None:
    """Raises AdapterError where the file is no longer the one of that stamp. A server is asked again."""
    if isinstance(descriptor, Address):
        descriptor.facts(again=True)
    now = Stamp.of(descriptor)
    if was is not None and now != was:
        if not path.exists():
            raise AdapterError(f"{path} {GONE}")
        what = f"{was.size:,} bytes, now {now.size:,}" if now.size != was.size else "the same size, written later"
        raise AdapterError(f"{path} has changed since it was opened ({what}): nothing else may write to it; run again")


def content(path: Where, missing: str = "is not there", most: int | None = None) -> bytes:
    """All bytes of a small file. most: Raises AdapterError where it has more of them."""
    with reading(path, missing=missing) as file:
        size = Stamp.of(file).size
        if most is not None and size > most:
            raise AdapterError(f"{path} has {size:,} bytes, expected at most {most:,}")
        text = bytearray(size)
        read_at(path, file, memoryview(text), 0)
    return bytes(text)


def read_at(path: Where, descriptor: Opened, into: memoryview, at: int) -> None:
    """into = the bytes of the file from at on, all of them. Raises AdapterError where it ends before, or fails."""
    if isinstance(descriptor, Address):
        descriptor.read_at(into, at)
        return
    done, size = 0, len(into)
    try:
        while done < size:
            got = os.preadv(descriptor, [into[done:]], at + done)
            if not got:
                raise AdapterError(f"{path} ends before byte {at + size:,}, which it had: cut short; {AGAIN}")
            done += got
    except OSError as error:
        raise Unreadable(f"{path} cannot be read at byte {at + done:,}: {error.strerror}") from None


def write_at(path: Path, descriptor: int, data: memoryview, at: int) -> None:
    """All the bytes, to the file from at on. Raises OSError that names it."""
    done = 0
    with naming(path):
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], at + done)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """An OSError of inside names the file."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _open(path: Path, root: Path, was: Stamp | None) -> int:
    if was is None or Stamp.said(os.stat(path)) != was:  # else it is the one that has been looked at
        for step in (path, *(folder for folder in path.parents if root in folder.parents)):
            if stat.S_ISLNK(os.lstat(step).st_mode):
                inside(step, root)
    regular(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        regular(path, os.fstat(descriptor).st_mode)  # what is there now need not be what was there before
    except AdapterError:
        os.close(descriptor)
        raise
    return descriptor


def regular(path: Path, mode: int) -> None:
    """Raises AdapterError for what is no file."""
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise AdapterError(f"{path} is {kind}, expected a file")


def inside(link: Path, root: Path | None = None) -> None:
    """Raises AdapterError where a link leads out of root, which is by default the directory that it lies in.

    A Hugging Face cache is allowed for: links of `snapshots/<revision>` may lead into the `blobs` beside `snapshots`.
    """
    home = Path(os.path.realpath(root or link.parent))
    hubs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
    target = Path(os.path.realpath(link))
    if target != home and not any(folder in target.parents for folder in (home, *hubs)):
        fix = "put the file itself there, as cp -rL does"
        raise AdapterError(f"{link} is a link to {str(target)!r}, outside of its directory: {fix}")
