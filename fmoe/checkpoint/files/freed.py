"""What is freed goes back to the system, and stays with no thread: while somebody else's code takes large blocks."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD = -3  # of glibc's mallopt
_BLOCK, _MOST = 2**20, 32 * 2**20


@contextmanager
def given_back() -> Iterator[None]:
    """While inside, a block of a MB or more is a map of its own, which the system has back when it is freed.

    glibc asks for maps too, but only of what is larger than the largest that was freed so far, up to 32 MB: then each
    thread's arena keeps what it once gave. Afterwards that bound is where it would be by itself, at 32 MB. Another
    malloc is left alone.

    >>> with given_back():
    ...     len(bytearray(2**21))
    2097152
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda what, to: 0)
    mallopt(_MMAP_THRESHOLD, _BLOCK)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _MOST)
