"""A GGUF file (llama.cpp): metadata by key, tensor records, then the data; read as strictly as ggml reads it.

Nothing is believed: every length is held against the file's size before it is followed, tensors lie one after the
other at multiples of the alignment, and a type that is not stored as plain numbers is refused by its name.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.strict import MOST, short, too_long
from fmoe.types import AdapterError, Problem, TensorSpec

MAGIC = b"GGUF"
SUFFIX = ".gguf"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that are plain numbers. MXFP4 is read as it is too: uint8, 17 bytes for each 32 values."""
_OTHERS = "F32:1:4 F16:1:2 Q4_0:32:18 Q4_1:32:20 - - Q5_0:32:22 Q5_1:32:24 Q8_0:32:34 Q8_1:32:40 Q2_K:256:84"
_OTHERS += " Q3_K:256:110 Q4_K:256:144 Q5_K:256:176 Q6_K:256:210 Q8_K:256:292 IQ2_XXS:256:66 IQ2_XS:256:74"
_OTHERS += " IQ3_XXS:256:98 IQ1_S:256:50 IQ4_NL:32:18 IQ3_S:256:110 IQ2_S:256:82 IQ4_XS:256:136 I8:1:1 I16:1:2 I32:1:4"
_OTHERS += " I64:1:8 F64:1:8 IQ1_M:256:56 BF16:1:2 - - - TQ1_0:256:54 TQ2_0:256:66 - - - MXFP4:32:17 NVFP4:64:36"
_OTHERS += " Q1_0:128:18"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_RANK = 4  # GGML_MAX_DIMS


class Type(NamedTuple):
    """A row's length is a multiple of `values`, and so many values take `nbytes`."""

    name: str
    values: int
    nbytes: int


TYPES = {
    i: Type(name, int(values), int(nbytes))
    for i, said in enumerate(_OTHERS.split())
    if said != "-"
    for name, values, nbytes in [said.split(":")]
}
CODES = {kind.name: i for i, kind in TYPES.items()}


class Info(NamedTuple):
    """A tensor's record. shape: row-major, the file's dimensions backwards. at: where in the file its bytes begin."""

    shape: tuple[int, ...]
    type: Type
    at: int
    nbytes: int

    @property
    def spec(self) -> TensorSpec:
        """What it is read as. Only of types that are read."""
        if self.type.name == "MXFP4":
            return TensorSpec((*self.shape[:-1], self.shape[-1] // 32 * 17), torch.uint8)
        return TensorSpec(self.shape, DTYPES[self.type.name])


class Key(NamedTuple):
    """An entry of the metadata: its bytes in the file, name and type with them; its value, if that is no list."""

    start: int
    stop: int
    kind: int
    value: Any


class File(NamedTuple):
    """What a GGUF file says of itself."""

    path: Path
    stamp: disk.Stamp
    keys: dict[str, Key]
    tensors: dict[str, Info]
    alignment: int

    def read(self, start: int, stop: int) -> bytes:
        """Some of its bytes, if it is still the same file."""
        with disk.reading(self.path, self.stamp) as file:
            data = bytearray(stop - start)
            disk.read_at(self.path, file, memoryview(data), start)
        return bytes(data)


class _Cursor:
    """The bytes of a file in order, taken in blocks; none beyond its end, nor more than a header may have."""

    def __init__(self, path: Path, file: disk.Opened, size: int):
        self.path, self.file, self.size = path, file, size
        self.at = self.start = 0
        self.block = b""

    def take(self, n: int, what: str) -> bytes:
        first = self.skip(n, what)
        if not self.start <= first <= first + n <= self.start + len(self.block):
            data = bytearray(min(max(n, 2**20), self.size - first))
            disk.read_at(self.path, self.file, memoryview(data), first)
            self.block, self.start = bytes(data), first
        return self.block[first - self.start : first - self.start + n]

    def skip(self, n: int, what: str) -> int:
        if self.at + n > min(self.size, 4 * MOST):
            why = f"cut short: {disk.AGAIN}" if self.at + n > self.size else "that is too much for a header"
            raise AdapterError(f"{self.path} has {self.size:,} bytes, and {what} would end at {self.at + n:,}: {why}")
        self.at += n
        return self.at - n

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise AdapterError(f"{self.path}: {what} is no UTF-8: {short(data)}") from None


def read_file(path: Path) -> File:
    """The header of a GGUF file. Raises AdapterError naming what is wrong with it, down to the tensor."""
    with disk.reading(path) as file:
        stamp = disk.Stamp.of(file)
        cursor = _Cursor(path, file, stamp.size)
        if (magic := cursor.take(4, "the magic number")) != MAGIC:
            raise AdapterError(f"{path} is no GGUF file: it begins with {short(magic)}")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            why = "of a machine of the other byte order" if version >> 16 else "of before 2023, or later than this fmoe"
            raise AdapterError(f"{path} has GGUF version {version}, {why}: expected 2 or 3")
        tensors, keys = cursor.number("Q", "the count of tensors"), cursor.number("Q", "the count of keys")
        found = _keys(cursor, keys)
        alignment = found["general.alignment"].value if "general.alignment" in found else 32
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
            raise AdapterError(f"{path} has general.alignment {short(alignment)}, expected a power of two")
        infos = _tensors(cursor, tensors, alignment)
    return File(path, stamp, found, infos, alignment)


def _keys(cursor: _Cursor, count: int) -> dict[str, Key]:
    found: dict[str, Key] = {}
    for i in range(count):
        start, what = cursor.at, f"metadata key {i:,}"
        name = cursor.text(what)
        if name in found:
            raise AdapterError(f"{cursor.path}: the metadata key {short(name)} is there twice")
        kind, value = cursor.number("I", what), None
        if kind in _SCALARS:
            value = cursor.number(_SCALARS[kind], short(name))
        elif kind == _TEXT:
            value = cursor.text(short(name))
        elif kind == _LIST:
            inner, n = cursor.number("I", short(name)), cursor.number("Q", short(name))
            if inner not in _SCALARS and inner != _TEXT:
                raise AdapterError(f"{cursor.path}: {short(name)} is a list of type {inner}, expected numbers or texts")
            if inner in _SCALARS:
                cursor.skip(n * struct.calcsize(f"<{_SCALARS[inner]}"), short(name))
            else:
                for _ in range(n):
                    cursor.skip(cursor.number("Q", short(name)), short(name))
        else:
            raise AdapterError(f"{cursor.path}: {short(name)} is of type {kind}, which GGUF has not")
        found[name] = Key(start, cursor.at, kind, value)
    return found


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Info]:
    said: dict[str, tuple[tuple[int, ...], Type, int]] = {}
    for i in range(count):
        name = cursor.text(f"the name of tensor {i:,}")
        if wrong := too_long(name) or ("is there twice" if name in said else ""):
            raise AdapterError([Problem(f"{cursor.path}: {short(name)} {wrong}", (name,))])
        what = short(name)
        rank = cursor.number("I", what)
        if rank > _RANK:
            raise AdapterError([Problem(f"{cursor.path}: {what} has {rank} dimensions, expected at most 4", (name,))])
        shape = tuple(cursor.number("Q", what) for _ in range(rank))[::-1]
        code, offset = cursor.number("I", what), cursor.number("Q", what)
        if code not in TYPES:
            text = f"{cursor.path}: {what} is of type {code}, which fmoe does not know"
            raise AdapterError([Problem(text, (name,))])
        if prod(n or 1 for n in shape) >= 2**59 or (shape[-1] if shape else 1) % TYPES[code].values:
            text = f"{cursor.path}: {what} cannot be {TYPES[code].name} {list(shape)}"
            raise AdapterError([Problem(text, (name,))])
        said[name] = (shape, TYPES[code], offset)
    return _placed(cursor, said, alignment)


def _placed(cursor: _Cursor, said: Mapping[str, tuple[tuple[int, ...], Type, int]], alignment: int) -> dict[str, Info]:
    """Tensors where they say that they are, which is one behind the other, each at a multiple of the alignment."""
    begin = end = -(-cursor.at // alignment) * alignment
    expected, before, made = 0, "the header", dict[str, Info]()
    for name, (shape, kind, offset) in said.items():
        size = prod(shape) // kind.values * kind.nbytes
        if offset != expected:
            where = f"inside {before}" if offset < expected else f"a hole after {before}"
            where = f"no multiple of {alignment}" if offset % alignment else where
            text = f"{cursor.path}: {short(name)} begins at {offset:,} of the data, {where}, expected {expected:,}"
            raise AdapterError([Problem(text, (name,))])
        made[name] = Info(shape, kind, begin + offset, size)
        expected, before, end = -(-(offset + size) // alignment) * alignment, short(name), begin + offset + size
        if end > cursor.size:
            text = f"{cursor.path} has {cursor.size:,} bytes, and {short(name)} ends at {end:,}: cut short"
            raise AdapterError([Problem(f"{text}: {disk.AGAIN}", (name,))])
    if said and cursor.size > begin + expected:
        raise AdapterError(
            f"{cursor.path} has {cursor.size:,} bytes, its tensors end at {end:,}: no tensor has the rest"
        )
    return made
