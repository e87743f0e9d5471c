"""A checkpoint of Orbax (MaxText's): arrays in compressed chunks, read by tensorstore, an extra (`fmoe[orbax]`).

A compressed chunk has no byte ranges, so a conversion first lays every array out once, chunk by chunk, in one file
beside what it writes (`Orbax.unpacked`), which the engine then reads as any other. Opened, no chunk is read:
`_METADATA` and the arrays say the same names, and every chunk of each is there.
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
from fmoe.checkpoint.files.containers import orbax_tree
from fmoe.checkpoint.files.containers.foreign import Foreign, Spans
from fmoe.checkpoint.files.weights import TREE
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

EXTRA = 'MaxText\'s checkpoints are read with tensorstore: pip install "fmoe[orbax]"'
UNPACKED = "fmoe.unpacked.part"
DTYPES = {
    n: getattr(torch, n)
    for n in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e5m2".split()
}


@dataclass(frozen=True)
class Orbax(Foreign):
    """arrays: tensorstore's handle of each tensor."""

    arrays: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def read(self, names: Iterable[str], parts: Mapping[str, Spans] = MappingProxyType({})) -> dict[str, Tensor]:
        """As `Checkpoint.read`, whole tensors; parts are of no use to what is compressed."""
        made = {}
        for name in names:
            spec = self.specs[name]
            data = np.ascontiguousarray(self._chunk(name, ())).reshape(-1).view(np.uint8)
            made[name] = torch.from_numpy(data.copy()).view(spec.dtype).view(spec.shape)
        return made

    def _chunk(self, name: str, box: tuple[slice, ...]) -> Any:
        try:
            return self.arrays[name][box].read().result()
        except Exception as error:  # whatever a broken store does
            raise _broken(self.path, name, error) from None

    def raw(self, path: Path) -> Foreign:
        """The same tensors as they will lie in that directory's one file, once they are unpacked."""
        offsets, at = dict[str, int](), 0
        for name, spec in self.specs.items():
            offsets[name] = at
            at += spec.nbytes
        return Foreign(path, self.config, self.specs, dict.fromkeys(self.specs, UNPACKED), offsets, {})

    @contextmanager
    def unpacked(self, raw: Foreign) -> Iterator[None]:
        """While inside, every array lies in that file, written chunk by chunk: memory holds one chunk."""
        path = Path(str(raw.path)) / UNPACKED
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, self.nbytes)
            for name, spec in self.specs.items():
                for box in _boxes(spec.shape, orbax_tree.written(self.arrays[name])):
                    for at, data in _runs(spec.shape, box, self._chunk(name, box)):
                        _all(descriptor, data, raw.offsets[name] + at)
            raw.stamps[UNPACKED] = disk.Stamp.of(descriptor)
            yield
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    starts = (range(0, n, max(1, c)) for n, c in zip(shape, chunk, strict=True))
    for at in product(*starts):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(at, chunk, shape, strict=True))


def _runs(shape: tuple[int, ...], box: tuple[slice, ...], values: Any) -> Iterator[tuple[int, memoryview]]:
    """(where it lies in the whole array's bytes, its bytes) of every contiguous run of a box."""
    values, sizes = np.ascontiguousarray(values), [b.stop - b.start for b in box]
    k = len(shape)  # the axes from k on are whole: a run is one index of those before k - 1
    while k and sizes[k - 1] == shape[k - 1]:
        k -= 1
    outer, item = sizes[: max(k - 1, 0)], values.dtype.itemsize
    steps = [prod(shape[i + 1 :]) for i in range(len(shape))]
    rows = values.reshape(-1).view(np.uint8).reshape(prod(outer), -1)
    for row, at in zip(rows, np.ndindex(*outer), strict=True):
        place = [*at, *([0] * (len(shape) - len(outer)))]
        start = sum((b.start + i) * s for b, i, s in zip(box, place, steps, strict=True))
        yield start * item, row.data


def _all(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


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
    specs, arrays, problems = dict[str, TensorSpec](), dict[str, Any](), list[Problem]()
    for name, key in named.items():
        try:
            store = {**where, "path": f"{where.get('path', '')}{key}/"}
            array = tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()
        except Exception as error:
            raise _broken(home, name, error) from None
        if (dtype := DTYPES.get(array.dtype.name)) is None:
            problems.append(
                Problem(f"{home}: {name!r} is {array.dtype.name}, expected one of {', '.join(DTYPES)}", (name,))
            )
            continue
        arrays[name], specs[name] = array, TensorSpec(tuple(array.shape), dtype)
        if tree.get("store_array_data_equal_to_fill_value", True) and (
            lost := orbax_tree.lost(array, key, driver, keys)
        ):
            problems.append(Problem(f"{home}: {name!r} lacks the chunks {some(lost)}", (name,)))
    if problems:
        raise AdapterError(problems)
    if not specs:
        raise AdapterError(f"{home} holds no params, but {some(left_out)}")
    files = dict.fromkeys(specs, TREE)
    return Orbax(
        home, config, specs, files, dict.fromkeys(specs, 0), stamps, left_out=left_out, container="orbax", arrays=arrays
    )


def _broken(home: Any, name: str, error: Exception) -> AdapterError:
    told = str(error).split(" [")[0].split("\n")[0][:300]
    return AdapterError([Problem(f"{home}: {name!r} cannot be read: {told}", (name,))])
