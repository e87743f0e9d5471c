"""A chunk of an Orbax array as a stream: from its value, by byte ranges, to where its numbers lie, a block at a time.

Orbax makes a chunk of a whole shard, which may be larger than what a conversion should hold. Where a chunk's bytes are
its numbers one behind the other, as they are or as frames of zstd, none of it is ever held whole: memory has a block
of the value, a block of numbers, and the window of the compressor, which is half a MB at the level that Orbax writes.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np

from fmoe.checkpoint.files.containers.items import strides_of
from fmoe.checkpoint.files.containers.orbax_tree import coding, written

BLOCK = 2**20
END = 1


def streams(array: Any) -> bool:
    """Whether its chunks can be read so: as they are, or zstd where `zstandard` is installed."""
    how = coding(array)
    return how == "raw" or how == "zstd" and find_spec("zstandard") is not None


def places(shape: tuple[int, ...], chunk: tuple[int, ...], first: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(its first number in the chunk, in the array, how many) of every run that is contiguous in both, in order.

    first: the index in the array of the chunk's first number; what of the chunk reaches over the edge is in no run.

    >>> list(places((3, 3), (2, 2), (0, 2)))
    [(0, 2, 1), (2, 5, 1)]
    """
    first = list(first)
    sizes = [min(c, n - f) for c, n, f in zip(chunk, shape, first, strict=True)]
    k = len(shape)  # the axes from k on are whole: a run is one index of those before k - 1
    while k and sizes[k - 1] == shape[k - 1] == chunk[k - 1]:
        k -= 1
    outer, here, there = sizes[: max(k - 1, 0)], strides_of(chunk), strides_of(shape)
    start, count = sum(f * s for f, s in zip(first, there, strict=True)), prod(sizes[len(outer) :])
    for at in np.ndindex(*outer):
        mine, theirs = (sum(i * s for i, s in zip(at, steps, strict=False)) for steps in (here, there))
        yield mine, start + theirs, count


def laid(array: Any, word: str, runs: Iterable[tuple[int, int, int]], write: Callable[[int, memoryview], None]) -> None:
    """Writes the runs (of `places`) of the chunk that its store has under that word; one that it lacks is its filling.

    Raises ValueError where the value is not exactly the chunk's bytes.
    """
    dtype, block, at = array.dtype.numpy_dtype, memoryview(bytearray(BLOCK)), 0
    source = _source(array, word)
    if source is None:
        fill = 0 if array.fill_value is None else array.fill_value
        block[:] = np.asarray(fill, dtype).tobytes() * (BLOCK // dtype.itemsize)

    def moved(count: int, to: int | None = None) -> None:
        for done in range(0, count, BLOCK):
            part = block[: min(BLOCK, count - done)]
            if source is not None and _filled(source, part) < len(part):
                raise ValueError(f"the chunk {word} ends too early")
            if to is not None:
                write(to + done, part)

    for here, there, count in (tuple(n * dtype.itemsize for n in run) for run in runs):
        moved(here - at)
        moved(count, there)
        at = here + count
    moved(prod(written(array)) * dtype.itemsize - at)
    if source is not None and (_filled(source, block[:2]) != 1 or block[0] != END):
        raise ValueError(f"the chunk {word} does not end with its last number")


def _source(array: Any, word: str) -> Any:
    """The chunk's bytes, and END behind them; None of one that is not there."""
    if array.kvstore.read(word, byte_range=slice(0, 0)).result().state == "missing":
        return None
    if coding(array) == "raw":
        return io.BufferedReader(_Value(array.kvstore, word, bytes([END])), BLOCK)
    import zstandard

    value: Any = _Value(array.kvstore, word, zstandard.compress(bytes([END])))
    return zstandard.ZstdDecompressor().stream_reader(value, read_size=BLOCK, read_across_frames=True)


def _filled(source: Any, view: memoryview) -> int:
    """How much of the view the source had bytes for."""
    done = 0
    while done < len(view) and (count := source.readinto(view[done:])):
        done += count
    return done


class _Value(io.RawIOBase):
    """A value of a store, read by byte ranges, and then an end: a frame of its own, which only follows whole ones."""

    def __init__(self, store: Any, word: str, end: bytes):
        self.store, self.word, self.end = store, word, end
        self.at, self.most = 0, BLOCK

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        while size := min(len(view), self.most):
            try:
                found = self.store.read(self.word, byte_range=slice(self.at, self.at + size)).result().value
            except ValueError:  # the value ends before that: nothing says where
                self.most = size // 2
                continue
            view[: len(found)] = found
            self.at += len(found)
            return len(found)
        found, self.end = self.end, b""
        view[: len(found)] = found
        return len(found)
