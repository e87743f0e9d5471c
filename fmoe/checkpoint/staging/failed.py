"""What the system says of a file that is written, as the one kind of error that reaches a user."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fmoe.checkpoint.remote.trouble import Unreadable

_FULL = ". Fix: make room, then run it again"
_GONE = ". Fix: see that nothing else moves or removes it meanwhile, then run it again"
_FIX = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL)
_FIX |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE), _GONE)


class Failed(Unreadable, OSError):
    """A file, why it could not be written, and what to do; the system's number and names are still there.

    >>> error = Failed.of(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"))
    >>> print(error, error.errno)
    a/b: No such file or directory. Fix: see that nothing else moves or removes it meanwhile, then run it again 2
    """

    @classmethod
    def of(cls, error: OSError) -> "Failed":
        why = error.strerror or " ".join(map(str, error.args)) or type(error).__name__
        made = cls(f"{error.filename2 or error.filename}: {why}{_FIX.get(error.errno or 0, '')}")
        made.__setstate__({n: getattr(error, n) for n in ("errno", "strerror", "filename", "filename2")})
        return made

    def __str__(self) -> str:
        return self.problems[0]

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {n: getattr(self, n) for n in ("errno", "strerror", "filename", "filename2")}
        return type(self), (self.found,), kept


@contextmanager
def failures() -> Iterator[None]:
    """The system's errors of inside that name a file are told as `Failed`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or isinstance(error, Failed):
            raise
        raise Failed.of(error) from None
