"""Memory by the page on a CPU: what is not written costs nothing, and what was given back is had again for nothing."""

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LARGE = 1 << 22  # bytes; malloc takes more than about so many from the system, each time anew and in small pages


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of a shape, with the dtype and device of `like`; on a CPU, large ones are pages that the system fills when
    they are first written: a gradient of many experts costs what its used experts cost.

    >>> zeros((2, 1), torch.ones(1)).tolist()
    [[0.0], [0.0]]
    """
    return like.new_zeros(shape) if _small(shape, like) else _tensor(_map(_bytes(shape, like)), shape, like)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory of a shape, with the dtype and device of `like`, of which nobody has written a number yet."""
    if _small(shape, like):
        return like.new_empty(shape)
    pages = POOL.take(_bytes(shape, like))
    whole = memoryview(pages)
    weakref.finalize(whole, POOL.give, pages).atexit = False
    return _tensor(whole, shape, like)


def partly(shape: tuple[int, ...], like: Tensor, used: Sequence[object]) -> Tensor:
    """[E, ..] that is 0 where not used[e], and elsewhere whatever it is: the caller writes all of that.

    Memory that is at hand is zeroed in a third of the time that the system takes to give as much anew.

    >>> partly((2, 1), torch.ones(1), [0, 5])[0].tolist()
    [0.0]
    """
    idle = [e for e, n in enumerate(used) if not n]
    if not like.is_cpu or 4 * len(idle) >= 3 * len(used):
        return zeros(shape, like)
    out = empty(shape, like)
    for e in idle:
        out[e].zero_()
    return out


class Pool:
    """Pages that a tensor gave back, for the next one of about their size: a step of training has those of the last.

    The system makes and zeroes a page in the time in which it could be written three times. Pages that nobody uses are
    offered to it (MADV_FREE): it takes them when it is short of memory, and a process that waits costs no other one.
    All pages together, used or not, are at most as many bytes as were in use at once.

    >>> pool = Pool()
    >>> pages = pool.take(8192)
    >>> pool.give(pages)
    >>> pool.take(8000) is pages
    True
    """

    def __init__(self) -> None:
        self.idle: list[mmap.mmap] = []  # oldest first
        self.used = self.most = 0
        self._back: deque[mmap.mmap] = deque()  # a tensor ends anywhere, in `take` too: there it waits for no lock
        self._lock = threading.Lock()

    def take(self, size: int) -> mmap.mmap:
        """At least `size` bytes, and at most a quarter more."""
        with self._lock:
            while self._back:
                self.idle.append(self._back.popleft())
                self.used -= len(self.idle[-1])
            # the last to come back is the likeliest to be in a cache
            fit = [pages for pages in reversed(self.idle) if size <= len(pages) <= size + size // 4]
            if fit:
                pages = min(fit, key=len)
                self.idle.remove(pages)
            else:
                pages = _map(size)
            self.used += len(pages)
            self.most = max(self.most, self.used)
            while self.used + sum(map(len, self.idle)) > self.most:
                self.idle.pop(0)
            return pages

    def give(self, pages: mmap.mmap) -> None:
        """What `take` gave; nobody reads it any more."""
        pages.madvise(mmap.MADV_FREE)
        self._back.append(pages)


POOL = Pool()


def _bytes(shape: tuple[int, ...], like: Tensor) -> int:
    return prod(shape) * like.itemsize


def _small(shape: tuple[int, ...], like: Tensor) -> bool:
    return not like.is_cpu or _bytes(shape, like) < LARGE or not hasattr(mmap, "MADV_HUGEPAGE")


def _map(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _tensor(pages: mmap.mmap | memoryview, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.frombuffer(pages, dtype=like.dtype, count=prod(shape)).view(*shape)
