"""Files that somebody else wrote: which of them may be opened, and bytes read from them whole or not at all.

A file is a regular one (a pipe would wait, a device has no end), lies in the directory that was asked for, and is at
each reading the one that it was when its header was read. Everything else is an AdapterError naming the file.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fmoe.types import AdapterError

AGAIN = "download or copy it again"


class Unreadable(AdapterError):
    """A file that the system did not let us read: nothing is wrong with what it holds, and later it may go."""


class Stamp(NamedTuple):
    """What a file was when it was opened: another file, size or time of writing later on means other bytes."""

    device: int
    inode: int
    size: int
    written: int

    @classmethod
    def of(cls, descriptor: int) -> "Stamp":
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextmanager
def reading(path: Path, was: Stamp | None = None, missing: str = "is not there") -> Iterator[int]:
    """A descriptor of the regular file at path; was: and still the one of that stamp. missing: said if not.

    Never waits. Raises AdapterError where there is none, where a link leads out of the directory, where it may not be
    read, or where it has changed.
    """
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        raise AdapterError(f"{path} {missing}") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None
    try:
        unchanged(path, descriptor, was)
        yield descriptor
    finally:
        os.close(descriptor)


def unchanged(path: Path, descriptor: int, was: Stamp | None) -> None:
    """Raises AdapterError where the file is no longer the one of that stamp."""
    now = Stamp.of(descriptor)
    if was is not None and now != was:
        what = f"{was.size:,} bytes, now {now.size:,}" if now.size != was.size else "the same size, written later"
        raise AdapterError(f"{path} has changed since it was opened ({what}): nothing else may write to it; run again")


def read_at(path: Path, descriptor: int, into: memoryview, at: int) -> None:
    """into = the bytes of the file from at on, all of them. Raises AdapterError where it ends before, or fails."""
    done, size = 0, len(into)
    try:
        while done < size:
            got = os.preadv(descriptor, [into[done:]], at + done)
            if not got:
                raise AdapterError(f"{path} ends before byte {at + size:,}, which it had: cut short; {AGAIN}")
            done += got
    except OSError as error:
        raise Unreadable(f"{path} cannot be read at byte {at + done:,}: {error.strerror}") from None


def _open(path: Path) -> int:
    if stat.S_ISLNK(os.lstat(path).st_mode):
        inside(path)
    _regular(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _regular(path, os.fstat(descriptor).st_mode)  # what is there now need not be what was there before
    except AdapterError:
        os.close(descriptor)
        raise
    return descriptor


def _regular(path: Path, mode: int) -> None:
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
        raise AdapterError(f"{link} is a link to {str(target)!r}, outside of its directory: put the file itself there")


def others(root: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """Every file below root that is wanted and not hidden, relative to it, in order; links to files as `inside` has it.

    Raises AdapterError for what cannot be copied as a file: a link that leads out, a link to a folder, a pipe.
    """

    def refuse(error: OSError) -> None:
        raise AdapterError(f"{error.filename} cannot be read: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        links = [n for n in folders if os.path.islink(os.path.join(folder, n))]
        paths = [Path(folder, n).relative_to(root) for n in (*links, *names)]
        found += [path for path in paths if not path.parts[0].startswith(".") and wanted(path)]
        if Path(folder) == root:
            folders[:] = [n for n in folders if not n.startswith(".")]
    for path in sorted(found):
        _copied(root, path)
        yield path


def _copied(root: Path, path: Path) -> None:
    if not str(path).isprintable():
        raise AdapterError(f"{root} has a file named {str(path)!r}: rename it")
    try:
        if (root / path).is_symlink():
            inside(root / path, root)
        _regular(root / path, os.stat(root / path).st_mode)
    except OSError as error:
        raise AdapterError(f"{root / path} cannot be read: {error.strerror}") from None
