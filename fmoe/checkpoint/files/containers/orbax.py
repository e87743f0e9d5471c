"""A checkpoint of Orbax (MaxText's): arrays in chunks, opened by tensorstore, an extra (`fmoe[orbax]`).

A chunk that is stored as it is, in a file of its own, is read by byte ranges as any other file. A compressed one has
none, so a conversion first lays those arrays out once, chunk by chunk, in one file beside what it writes
(`Orbax.unpacked`), which the engine then reads. Opened, no chunk is read: `_METADATA` and the arrays say the same
names, and every chunk of each is there.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.containers import orbax_stream, orbax_tree
from fmoe.checkpoint.files.containers.foreign import Foreign, touched
from fmoe.checkpoint.files.containers.items import strides_of
from fmoe.checkpoint.files.directory import Checkpoint, Spans
from fmoe.checkpoint.files.freed import given_back
from fmoe.checkpoint.files.weights import TREE
from fmoe.layout.axes import Copy
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

EXTRA = 'MaxText\'s checkpoints are read with tensorstore: pip install "fmoe[orbax]"'
UNPACKED = "fmoe.unpacked.part"
WHOLE = 16 * 2**20  # bytes of the largest chunk that is decompressed at once, where parts of it can be
ONE = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
"""Of tensorstore: a chunk at a time, so that memory holds no more of them."""
DTYPES = {
    n: getattr(torch, n)
    for n in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2".split()
}


@dataclass(frozen=True)
class Orbax(Foreign):
    """arrays: tensorstore's handle of each tensor that only it can read: compressed, or of several machines."""

    arrays: dict[str, Any] = field(default_factory=dict, repr=False)

    def placed(self, name: str, key: str, array: Any, plain: bool) -> str:
        """Takes an array in, by its chunks' files where these hold its bytes as they are; what is wrong with those."""
        self.files[name], self.offsets[name] = TREE, 0
        if not plain or not orbax_tree.plain(array):
            self.arrays[name] = array
            return ""
        shape, dtype = self.specs[name]
        sizes, pieces = orbax_tree.written(array), []
        here, there = strides_of(sizes), strides_of(shape)
        for word, first in orbax_tree.chunks(array):
            file, part = f"{key}/{word}", f"{name}\0{word}"
            start = sum(i * s for i, s in zip(first, there, strict=True))
            pieces.append(Copy(part, name, sizes, 0, here, start, there, dtype))
            self.files[part], self.offsets[part] = file, 0
            if (size := self.stamps[file].size) != pieces[-1].nbytes:
                return f"cannot be read: {file} has {size:,} bytes, expected {pieces[-1].nbytes:,}"
        self.cut[name] = tuple(pieces)
        return ""

    @property
    def largest(self) -> int:
        """Bytes of the largest chunk that is decompressed whole, of which memory holds two, and it compressed."""
        return max((self._decoded(n) for n in self.arrays if not self._streams(n)), default=0)

    def _decoded(self, name: str) -> int:
        return prod(orbax_tree.decoded(self.arrays[name])) * self.specs[name].dtype.itemsize

    def _streams(self, name: str) -> bool:
        return self._decoded(name) > WHOLE and orbax_stream.streams(self.arrays[name])

    def read(self, names: Iterable[str], parts: Mapping[str, Spans] = MappingProxyType({})) -> dict[str, Tensor]:
        """As `Checkpoint.read`; of what is compressed, the chunks that hold a byte of the parts."""
        names = list(names)
        made = super().read([n for n in names if n not in self.arrays], parts)
        for name in (n for n in names if n in self.arrays):
            spec = self.specs[name]
            made[name] = torch.empty(spec.shape, dtype=spec.dtype)
            whole = self._view(name, made[name].reshape(-1).view(torch.uint8), spec.shape)
            for box in self._chunks(name, parts.get(name)):
                self._take(name, box, whole[box])
        return {n: made[n] for n in names}

    def _view(self, name: str, data: Tensor, shape: tuple[int, ...]) -> Any:
        """The bytes as an array of what tensorstore calls its numbers."""
        return data.numpy().view(self.arrays[name].dtype.numpy_dtype).reshape(shape)

    def _chunks(self, name: str, spans: Spans | None) -> Iterator[tuple[slice, ...]]:
        """Those of an array that have a byte in the spans."""
        shape, dtype = self.specs[name]
        for box in _boxes(shape, orbax_tree.decoded(self.arrays[name])):
            there = strides_of(shape)
            start = sum(b.start * s for b, s in zip(box, there, strict=True))
            if touched([b.stop - b.start for b in box], there, start, dtype.itemsize, spans):
                yield box

    def _take(self, name: str, box: tuple[slice, ...], into: Any) -> None:
        import tensorstore

        try:
            tensorstore.array(into).write(self.arrays[name][box]).result()
        except Exception as error:  # whatever a broken store does
            raise _broken(self.path, name, error) from None

    def raw(self, path: Path) -> Foreign:
        """The same tensors, those that are compressed as they will lie in that directory's one file, unpacked."""
        here = Path(os.path.abspath(self.path))
        files = {n: str(here / file) for n, file in self.files.items() if n not in self.arrays}
        stamps = {file: self.stamps[self.files[n]] for n, file in files.items()}
        offsets, at = {n: self.offsets[n] for n in files}, 0
        for name in self.arrays:
            files[name], offsets[name] = UNPACKED, at
            at += self.specs[name].nbytes
        return Foreign(path, self.config, self.specs, files, offsets, stamps, cut=self.cut)

    @contextmanager
    def unpacked(self, folder: Path, raw: Checkpoint, spans: Spans) -> Iterator[None]:
        """While inside, those arrays lie in that file, written chunk by chunk: memory holds one, or a block of it.

        spans: of that file, what will be read of it; without any it is not made.
        """
        if not spans:
            yield
            return
        path = folder / UNPACKED
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, sum(self.specs[n].nbytes for n in self.arrays))
            with given_back():
                buffer = torch.empty(self.largest, dtype=torch.uint8)
                for name in self.arrays:
                    self._unpack(name, buffer, path, descriptor, raw.offsets[name], spans)
                del buffer
            raw.stamps[UNPACKED] = disk.Stamp.of(descriptor)
            yield
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def _unpack(self, name: str, buffer: Tensor, path: Path, descriptor: int, begin: int, spans: Spans) -> None:
        shape, dtype = self.specs[name]
        array, streams = self.arrays[name], self._streams(name)
        write = lambda at, data: disk.write_at(path, descriptor, data, begin + at)
        for box in self._chunks(name, [(at - begin, size) for at, size in spans]):
            first, sizes = [b.start for b in box], tuple(b.stop - b.start for b in box)
            if streams:
                runs = orbax_stream.places(shape, orbax_tree.written(array), first)
                try:
                    orbax_stream.laid(array, orbax_tree.word(array, first), runs, write)
                except Exception as error:  # whatever a broken store, or what decompresses it, does
                    if getattr(error, "filename", None):  # of what is written
                        raise
                    raise _broken(self.path, name, error) from None
                continue
            values = self._view(name, buffer[: prod(sizes) * dtype.itemsize], sizes)
            self._take(name, box, values)
            data = memoryview(values.reshape(-1).view(np.uint8))
            for here, there, count in orbax_stream.places(shape, sizes, first):
                write(there * dtype.itemsize, data[here * dtype.itemsize : (here + count) * dtype.itemsize])


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    starts = (range(0, n, max(1, c)) for n, c in zip(shape, chunk, strict=True))
    for at in product(*starts):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(at, chunk, shape, strict=True))


def open_orbax(path: Path, config: dict[str, Any]) -> Orbax:
    """Raises AdapterError naming what is wrong: arrays or chunks that are missing, or that the tree does not name.

    ImportError without tensorstore.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(EXTRA) from error
    home = orbax_tree.home_of(path) or path
    stamps = {name: orbax_tree.stamp(home / name) for name in orbax_tree.files(home)}
    tree = orbax_tree.tree(home / TREE, stamps[TREE])
    named, left_out = orbax_tree.named(home, tree)
    where: dict[str, Any] = {"driver": "file", "path": f"{home}/"}
    if "manifest.ocdbt" in stamps:
        where = {"driver": "ocdbt", "base": f"file://{home}/"}
    driver, entry = ("zarr3", "zarr.json") if tree.get("use_zarr3") else ("zarr", ".zarray")
    try:
        keys = {k.decode() for k in tensorstore.KvStore.open(where).result().list().result()}
    except Exception as error:
        raise _broken(home, "manifest.ocdbt", error) from None
    there = {k.removesuffix(f"/{entry}") for k in keys if k.endswith(f"/{entry}")}
    orbax_tree.same(home, named, {k for k in there if k.split(".")[0] == orbax_tree.PARAMS})
    made = Orbax(home, config, {}, {}, {}, stamps, left_out=left_out, container="orbax", arrays={})
    one, problems = tensorstore.Context(ONE), list[Problem]()
    for name, key in named.items():
        store = {"driver": driver, "kvstore": {**where, "path": f"{where.get('path', '')}{key}/"}}
        try:
            array = tensorstore.open(store, open=True, read=True, context=one).result()
        except Exception as error:
            raise _broken(home, name, error) from None
        lost = orbax_tree.lost(array, key, keys)
        if (dtype := DTYPES.get(array.dtype.name)) is None:
            text = f"is {array.dtype.name}, expected one of {', '.join(DTYPES)}"
        elif lost and tree.get("store_array_data_equal_to_fill_value", True):
            text = f"lacks the chunks {some(lost)}"
        else:
            made.specs[name] = TensorSpec(tuple(array.shape), dtype)
            text = made.placed(name, key, array, plain=not lost and where["driver"] == "file")
        problems += [Problem(f"{home}: {name!r} {text}", (name,))] if text else []
    if problems:
        raise AdapterError(problems)
    if not made.specs:
        raise AdapterError(f"{home} holds no params, but {some(left_out)}")
    return made


def _broken(home: Any, name: str, error: Exception) -> AdapterError:
    told = str(error).split(" [")[0].split("\n")[0][:300]
    return AdapterError([Problem(f"{home}: {name!r} cannot be read: {told}", (name,))])
