"""A file of `torch.save`, read as data: what its pickle says of each tensor, and where that tensor's bytes lie.

The zip's directory says where its parts are; the pickle goes through the list of exact names, and nothing of it runs.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.containers import items, pickles
from fmoe.checkpoint.files.strict import MOST
from fmoe.types import AdapterError, TensorSpec


class Held(NamedTuple):
    """A tensor: what it is, and where in the file its bytes begin."""

    spec: TensorSpec
    at: int


class Saved(NamedTuple):
    """state: what was saved, tensors as `pickles.Rebuilt`. storages: key -> (where its bytes begin, how many)."""

    path: Path
    stamp: disk.Stamp
    state: Any
    storages: Mapping[str, tuple[int, int]]

    def held(self, name: str, tensor: pickles.Rebuilt) -> Held:
        """Where a tensor lies. Raises AdapterError where its record and its storage do not agree."""
        where = f"{self.path}: {name!r}"
        spec = items.spec_of(tensor, where)
        begin, size = self.storages.get(tensor.storage.key, (0, -1))
        start = tensor.offset * spec.dtype.itemsize
        if not 0 <= start <= start + spec.nbytes <= size:
            raise AdapterError(f"{where} has {max(size, 0):,} bytes, expected {spec.nbytes:,} from {start:,} on")
        return Held(spec, begin + start)


def read_saved(path: Path) -> Saved:
    """The state in a file. Raises AdapterError naming what is wrong: no zip, compressed, foreign names, cut short."""
    with disk.reading(path) as file:
        assert isinstance(file, int)
        stamp = disk.Stamp.of(file)
        inside = _members(path, file, stamp.size)
        pickled = next((m for n, m in inside.items() if n.endswith("/data.pkl")), None)
        if pickled is None or pickled.size > MOST:
            raise AdapterError(f"{path} has no data.pkl that could be read: no file of torch.save")
        order = next((m for n, m in inside.items() if n.endswith("/byteorder")), None)
        if order is not None and _bytes(path, file, _start(path, file, order, stamp.size), order.size) != b"little":
            raise AdapterError(f"{path} is of a machine of the other byte order")
        data = _bytes(path, file, _start(path, file, pickled, stamp.size), pickled.size)
        state = pickles.read(data, str(path), tensors=True, training=True)
        storages = {
            n.rpartition("/")[2]: (_start(path, file, m, stamp.size), m.size)
            for n, m in inside.items()
            if "/data/" in n
        }
    return Saved(path, stamp, state, storages)


def _members(path: Path, file: int, size: int) -> dict[str, items.Member]:
    for tail in (items.TAIL, MOST):  # the directory of many tensors is longer than the end of one
        data = _bytes(path, file, max(0, size - tail), min(size, tail))
        if tail == MOST or size <= tail or items.reaches(data, size):
            break
    return items.members(data, size, str(path))


def _start(path: Path, file: int, member: items.Member, size: int) -> int:
    """Where a member's own bytes begin: behind its local header."""
    if not 0 <= member.at <= member.at + 30 + member.size <= size:
        raise AdapterError(f"{path}: a part of its zip lies outside of it")
    head = _bytes(path, file, member.at, 30)
    if head[:4] != b"PK\3\4":
        raise AdapterError(f"{path}: no part of a zip where its directory says so")
    start = member.at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if start + member.size > size:
        raise AdapterError(f"{path}: a part of its zip ends behind it")
    return start


def _bytes(path: Path, file: int, at: int, size: int) -> bytes:
    data = bytearray(size)
    disk.read_at(path, file, memoryview(data), at)
    return bytes(data)


def alike(a: tuple[Path, int], b: tuple[Path, int], size: int, block: int = 2**20) -> bool:
    """Whether two files hold the same bytes from these places on."""
    with disk.reading(a[0]) as one, disk.reading(b[0]) as other:
        assert isinstance(one, int) and isinstance(other, int)
        for at in range(0, size, block):
            n = min(block, size - at)
            if os.pread(one, n, a[1] + at) != os.pread(other, n, b[1] + at):
                return False
    return True
