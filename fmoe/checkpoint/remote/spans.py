"""Many small reads of one file as few requests, and a bound on what is on its way at once."""

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from fmoe.checkpoint.remote.address import PIECE, Address

WASTE = 0.01  # of what is asked for, at most, lies between what is wanted
Span = tuple[int, int]
"""(the first byte, the one behind the last)."""


def joined(spans: Iterable[Span], waste: float = WASTE, most: int = PIECE) -> list[Span]:
    """Spans that lie side by side, or with little between, as one of at most `most` bytes; longer ones as they are.

    >>> joined([(0, 100), (100, 200), (201, 300), (900, 950)])
    [(0, 300), (900, 950)]
    """
    found: list[Span] = []
    wanted = 0  # bytes of the last span that are
    for start, end in sorted(spans):
        if found:
            first, last = found[-1]
            new = wanted + max(0, end - max(start, last))
            whole = max(last, end) - first
            if start < last or whole <= most and whole - new <= waste * whole:
                found[-1], wanted = (first, max(last, end)), new
                continue
        found.append((start, end))
        wanted = end - start
    return found


def scattered(address: Address, wanted: Sequence[tuple[int, memoryview]]) -> None:
    """view = the bytes of the file from at on, for every (at, view)."""
    views = sorted((w for w in wanted if len(w[1])), key=lambda w: w[0])
    for start, end in joined((at, at + len(view)) for at, view in views):
        inside = [(at, view) for at, view in views if start <= at < end]
        if len(inside) == 1:
            address.read_at(inside[0][1], start)
            continue
        block = memoryview(bytearray(end - start))
        address.read_at(block, start)
        for at, view in inside:
            view[:] = block[at - start : at - start + len(view)]


class Fetched:
    """Parts of a file, in memory."""

    def __init__(self, address: Address, spans: Iterable[Span]):
        self.parts: list[tuple[int, memoryview]] = []
        for start, end in joined(spans):
            block = memoryview(bytearray(end - start))
            address.read_at(block, start)
            self.parts.append((start, block))
        self.starts = [start for start, _ in self.parts]

    def read(self, into: memoryview, at: int) -> bool:
        """into = the bytes from at on; False where not all of them are here."""
        done = 0
        for start, block in self.parts[max(0, bisect_right(self.starts, at) - 1) :]:
            if done == len(into) or start > at + done:
                break
            part = block[at + done - start : at - start + len(into)]
            into[done : done + len(part)] = part
            done += len(part)
        return done == len(into)


class Gate:
    """At most so many bytes on their way; one piece of work always passes."""

    def __init__(self, most: int):
        self.most, self.inside = most, 0
        self.free = threading.Condition()

    @contextmanager
    def passing(self, size: int) -> Iterator[None]:
        with self.free:
            self.free.wait_for(lambda: not self.inside or self.inside + size <= self.most)
            self.inside += size
        try:
            yield
        finally:
            with self.free:
                self.inside -= size
                self.free.notify_all()
