"""One process at a time: the system's lock on the journal, or, on a file system that has none, a lease beside it.

A lease names its holder, and is renewed as long as that lives. Whoever finds one that is not makes the next one, whose
name follows from what the former says: so one process alone can. They all go with the last one's holder, the first one
first, without which no other counts.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fmoe.checkpoint.files.disk import naming
from fmoe.checkpoint.files.weights import JOURNAL, LEASE
from fmoe.checkpoint.staging.journal import boot
from fmoe.types import AdapterError

RENEWED, LAPSED = 10.0, 60.0  # seconds from one renewal to the next, and after which a lease counts no longer
_NONE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def locked(path: Path, journal: int) -> Iterator[Callable[[], bool]]:
    """Alone in this directory, whose journal is open; gives what tells whether that is still so, and it still there.

    Raises AdapterError at once where another process is; OSError.
    """
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path) from None
    except OSError as error:
        if error.errno not in _NONE:
            error.filename = str(path / JOURNAL)
            raise
        with _leased(path, journal) as held:
            yield from _there(path, lambda: _same(path, journal) and held())
        return
    yield from _there(path, lambda: _same(path, journal))


def _there(path: Path, held: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    if not held():
        raise AdapterError(f"{path}: another process has just finished writing to it")
    yield held


def _same(path: Path, journal: int) -> bool:
    """Whether the journal is still the one of this directory."""
    try:
        return os.path.samestat(os.fstat(journal), os.lstat(path / JOURNAL))
    except OSError:
        return False


def _busy(path: Path) -> AdapterError:
    return AdapterError(f"{path}: another process is writing to it: let it end, or stop it")


@contextmanager
def _leased(path: Path, journal: int) -> Iterator[Callable[[], bool]]:
    leases, ended = _leases(path, journal), threading.Event()
    me = json.dumps(_here() | {"pid": os.getpid(), "begun": _begun(os.getpid()), "id": os.urandom(8).hex()})
    mine, next_ = leases[-1], _after(path, me)

    def held() -> bool:
        return not next_.exists() and _leases(path, journal) == leases and _said(mine) == me

    def renew() -> None:
        while not ended.wait(RENEWED):
            with suppress(OSError):
                if held():
                    os.utime(mine)

    try:
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise _busy(path) from None
    try:
        with naming(mine), open(descriptor, "w") as file:
            file.write(me)
        if not held():  # what it follows has gone since it was looked at
            raise _busy(path)
    except BaseException:
        mine.unlink(missing_ok=True)
        raise
    for other in {*path.glob(f"{LEASE}.*")} - {*leases, next_}:
        other.unlink(missing_ok=True)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()
        if held():
            for lease in leases:
                lease.unlink(missing_ok=True)
            _cleared(path)


def _cleared(path: Path) -> None:
    """A journal that somebody has made since this one's went, and was then not let in, does not stay behind."""
    with suppress(AdapterError, OSError), open(path / JOURNAL, "rb+") as file:
        if not os.fstat(file.fileno()).st_size:
            with _leased(path, file.fileno()):
                if not os.fstat(file.fileno()).st_size:
                    (path / JOURNAL).unlink()


def _leases(path: Path, journal: int) -> list[Path]:
    """Those whose holders are gone, each one followed by the next, and the last, which is held or is not there."""
    found = [path / LEASE]
    while (text := _said(found[-1], journal)) is not None:
        found.append(_after(path, text))
    return found


def _after(path: Path, text: str) -> Path:
    return path / f"{LEASE}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _said(lease: Path, journal: int | None = None) -> str | None:
    """What a lease says, if there is one. journal: and if its holder is gone."""
    try:
        with open(os.open(lease, _READ), errors="replace") as file:
            text, written = file.read(), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    return text if journal is None or _gone(text, written, journal) else None


def _gone(text: str, written: float, journal: int) -> bool:
    """Whether whoever holds a lease is: known of a process of this machine, else told by its age."""
    with suppress(ValueError, KeyError, TypeError, OverflowError):
        said, here = json.loads(text), _here()
        if boot() and {n: said[n] for n in here} == here:
            return not _runs(said["pid"], said["begun"])
    with suppress(OSError):
        os.utime(journal)  # by the clock of the file system, which need not be this machine's
    return os.fstat(journal).st_mtime - written > LAPSED


def _here() -> dict[str, str]:
    """Where a number means a process. sees: which of them know each other by number, as those of one container do."""
    seen = Path("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot(), "sees": os.readlink(seen) if seen.exists() else ""}


def _runs(pid: int, begun: str) -> bool:
    with suppress(PermissionError):  # it runs, for somebody else
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return _begun(pid) in (begun, "")


def _begun(pid: int) -> str:
    """When it did, which tells it from a later one of its number; "ended" of one that nobody has waited for."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if state in "ZX" else facts[18]
