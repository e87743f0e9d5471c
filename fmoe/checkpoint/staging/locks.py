"""One process at a time: the system's lock on the journal, or, on a file system that has none, a lease beside it.

A lease names its holder and is renewed as long as that lives: whoever finds one that is not, takes it over.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fmoe.checkpoint.files.weights import JOURNAL
from fmoe.checkpoint.staging.journal import boot
from fmoe.types import AdapterError

LEASE = "fmoe.lease"
RENEWED, LAPSED = 10.0, 60.0  # seconds from one renewal to the next, and after which a lease counts no longer
_NONE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def locked(path: Path, journal: int) -> Iterator[None]:
    """Alone in this directory, whose journal is open. Raises AdapterError at once where another process is; OSError."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path) from None
    except OSError as error:
        if error.errno not in _NONE:
            error.filename = str(path / JOURNAL)
            raise
        with _leased(path):
            yield
        return
    try:
        same = os.path.samestat(os.fstat(journal), os.stat(path / JOURNAL))
    except FileNotFoundError:
        same = False
    if not same:
        raise AdapterError(f"{path}: another process has just finished writing to it")
    yield


def _busy(path: Path) -> AdapterError:
    return AdapterError(f"{path}: another process is writing to it: let it end, or stop it")


@contextmanager
def _leased(path: Path) -> Iterator[None]:
    lease, ended = path / LEASE, threading.Event()
    if _lapsed(lease):
        lease.unlink(missing_ok=True)
    me = {"host": socket.gethostname(), "boot": boot(), "pid": os.getpid()}
    try:
        descriptor = os.open(lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise _busy(path) from None
    with open(descriptor, "w") as file:
        json.dump(me, file)

    def renew() -> None:
        while not ended.wait(RENEWED):
            with suppress(OSError):
                os.utime(lease)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.unlink(missing_ok=True)


def _lapsed(lease: Path) -> bool:
    """Whether whoever holds a lease is gone: known of a process of this machine, else told by its age."""
    try:
        age, text = time.time() - lease.stat().st_mtime, lease.read_text()
    except OSError:
        return False
    try:
        held = json.loads(text)
        if boot() and (held["host"], held["boot"]) == (socket.gethostname(), boot()):
            return not Path(f"/proc/{held['pid']}").exists()
    except (ValueError, KeyError, TypeError):
        pass
    return age > LAPSED
