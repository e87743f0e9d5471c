"""Bytes written to files that exist, and the sums by which they are known again."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fmoe.checkpoint.files import disk

PIECE = 2**20


@contextmanager
def writing(path: Path) -> Iterator[int]:
    """A descriptor of a file that is there, to write and to look at what was written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(path: Path, descriptor: int, data: Tensor, at: int) -> None:
    """All the bytes [n] uint8, to the file at path from `at` on. Raises OSError that names it."""
    disk.write_at(path, descriptor, data.numpy().data, at)


def sum_of(data: Tensor, at: int) -> int:
    """Of bytes [n] uint8 that lie in a file from `at` on."""
    return zlib.crc32(data.numpy().data, at & 0xFFFFFFFF)


def sum_at(path: Path, descriptor: int, at: int, size: int) -> int:
    """The same of bytes that a file holds."""
    found, buffer = at & 0xFFFFFFFF, memoryview(bytearray(min(PIECE, size)))
    for start in range(at, at + size, PIECE):
        view = buffer[: min(PIECE, at + size - start)]
        disk.read_at(path, descriptor, view, start)
        found = zlib.crc32(view, found)
    return found
