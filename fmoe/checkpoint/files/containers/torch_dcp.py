"""A directory of torch.distributed.checkpoint (torchtitan, FSDP, Megatron's torch_dist): opened, and laid out.

Opened with no torch.distributed: `.metadata` says which part of each tensor lies where, the items say what they are,
and both must agree before anything is read.
"""

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.containers import items, pickles
from fmoe.checkpoint.files.containers.pickles import Record
from fmoe.checkpoint.files.weights import METADATA
from fmoe.layout.axes import Copy
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

LEFT_OUT = (
    "optimizer.",
    "optim.",
    "common_state",
    "rng_state",
    "train_state",
    "lr_scheduler",
    "dataloader",
    "scheduler",
    "args",
)
"""What a training run keeps beside the model: never read, and told."""


class Item(NamedTuple):
    """A chunk of a tensor, and where it lies."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int


class Opened(NamedTuple):
    """pieces: of a tensor in several chunks, the copies of these into it. left_out: what is not the model's."""

    specs: dict[str, TensorSpec]
    files: dict[str, str]
    offsets: dict[str, int]
    stamps: dict[str, disk.Stamp]
    pieces: dict[str, tuple[Copy, ...]]
    left_out: tuple[str, ...]


def open_dcp(path: Path) -> Opened:
    """Raises AdapterError naming what is wrong: a pickle of foreign names, items out of range, chunks that overlap."""
    with disk.reading(path / METADATA, missing="is missing: no directory of torch.distributed.checkpoint") as file:
        data = bytearray(disk.Stamp.of(file).size)
        disk.read_at(path / METADATA, file, memoryview(data), 0)
    found = pickles.read(bytes(data), str(path / METADATA))
    tensors, left_out = _specs(path, found)
    chunks = _items(path, found, tensors)
    _apart(path, chunks)
    specs: dict[str, TensorSpec] = {n: spec for n, (spec, _) in tensors.items()}
    stamps: dict[str, disk.Stamp] = {}
    places: dict[Item, int] = {}
    for name in dict.fromkeys(item.file for item in chunks):
        with disk.reading(path / name, missing=f"is not there, and {METADATA} names it") as file:
            assert isinstance(file, int)
            stamps[name] = disk.Stamp.of(file)
            for item in (i for i in chunks if i.file == name):
                places[item] = _place(path / name, file, item, specs[item.name].dtype, stamps[name].size)
    return _opened(path, specs, places, stamps, left_out)


def _specs(path: Path, found: Any) -> tuple[dict[str, tuple[TensorSpec, list[Any]]], tuple[str, ...]]:
    listed = found.get("state_dict_metadata") if isinstance(found, Record) else None
    if not isinstance(listed, dict):
        raise AdapterError(f"{path / METADATA} is no Metadata of torch.distributed.checkpoint")
    made: dict[str, tuple[TensorSpec, list[Any]]] = {}
    left_out = []
    for name, entry in listed.items():
        if (
            not isinstance(entry, Record)
            or type(entry).__name__ != "TensorStorageMetadata"
            or name.startswith(LEFT_OUT)
        ):
            left_out.append(str(name))
            continue
        dtype = _dtype(entry.get("properties"))
        size = entry.get("size")
        if not isinstance(dtype, torch.dtype) or not _numbers(size):
            raise AdapterError([Problem(f"{path / METADATA}: {name!r} has no dtype and size", (str(name),))])
        made[str(name)] = (TensorSpec(tuple(size), dtype), list(entry.get("chunks") or []))
    return made, tuple(left_out)


def _dtype(properties: Any) -> Any:
    """What TensorProperties says, whose state is a tuple with the dtype first."""
    if not isinstance(properties, Record):
        return None
    stated = properties.get("state", ())
    return properties.get("dtype", stated[0] if isinstance(stated, tuple) and stated else None)


def _numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _items(path: Path, found: Record, tensors: Mapping[str, tuple[TensorSpec, list[Any]]]) -> list[Item]:
    stored = found.get("storage_data")
    if not isinstance(stored, dict):
        raise AdapterError(f"{path / METADATA} has no storage_data")
    at: dict[tuple[str, tuple[int, ...]], Record] = {}
    for index, info in stored.items():
        if isinstance(index, Record) and isinstance(info, Record) and index.get("fqn") in tensors:
            at[index.get("fqn"), tuple(index.get("offset") or ())] = info
    made, problems = [], []
    for name, (spec, chunks) in tensors.items():
        boxes = [(c.get("offsets"), c.get("sizes")) for c in chunks if isinstance(c, Record)]
        if wrong := _untiled(spec.shape, boxes):
            problems.append(Problem(f"{path / METADATA}: {name!r} {wrong}", (name,)))
            continue
        for offsets, sizes in boxes:
            info = at.get((name, tuple(offsets)))
            if info is None:
                problems.append(Problem(f"{path / METADATA}: {name!r} at {list(offsets)} is in no file", (name,)))
            elif wrong := _unread(info):
                problems.append(Problem(f"{path / METADATA}: {name!r} {wrong}", (name,)))
            else:
                where = info.get("relative_path"), info.get("offset"), info.get("length")
                made.append(Item(name, tuple(offsets), tuple(sizes), *where))
    if problems:
        raise AdapterError(problems)
    return made


def _apart(path: Path, chunks: list[Item]) -> None:
    """Raises AdapterError where two items share bytes: one of the two would be the other's."""
    ordered = sorted(chunks, key=lambda item: (item.file, item.at))
    for a, b in pairwise(ordered):
        if a.file == b.file and b.at < a.at + a.length:
            text = f"{path / METADATA}: {a.name!r} and {b.name!r} share bytes of {a.file}, at {b.at:,}"
            raise AdapterError([Problem(text, (a.name, b.name))])


def _untiled(shape: tuple[int, ...], boxes: list[tuple[Any, Any]]) -> str:
    """Why chunks do not tile a tensor; empty if they do. Counting suffices once none overlaps another."""
    for offsets, sizes in boxes:
        fits = _numbers(offsets) and _numbers(sizes) and len(offsets) == len(sizes) == len(shape)
        if not fits or any(o + n > size for o, n, size in zip(offsets, sizes, shape, strict=True)):
            return f"{list(shape)} has a chunk {offsets} {sizes} that lies outside of it"
    total = sum(TensorSpec(tuple(sizes), torch.uint8).numel for _, sizes in boxes)
    if total != TensorSpec(shape, torch.uint8).numel or not boxes:
        return f"{list(shape)} has chunks of {total:,} elements: some are missing, or overlap"
    ordered = sorted(boxes)
    for i, (a, n) in enumerate(ordered):
        for b, m in ordered[i + 1 :]:
            if not shape or b[0] >= a[0] + n[0]:
                break
            if all(x < y + k and y < x + j for x, j, y, k in zip(a, n, b, m, strict=True)):
                return f"{list(shape)} has chunks that overlap, at {list(a)} and {list(b)}"
    return ""


def _unread(info: Record) -> str:
    name, at, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(name, str) or os.path.basename(name) != name or not name.isprintable() or name in ("", ".", ".."):
        return f"lies in {name!r}, expected a file of the directory"
    if type(at) is not int or type(length) is not int or at < 0 or length < 0:
        return f"lies at {at!r}, {length!r} bytes, expected whole numbers"
    if info.get("transform_descriptors"):
        return "is stored transformed (compressed), which is not read"
    return ""


def _place(path: Path, file: int, item: Item, dtype: torch.dtype, size: int) -> int:
    """Where the bytes of an item begin in its file. Raises AdapterError where the item is not what it should be."""
    where = f"{path}: {item.name!r} {list(item.offsets)}"
    if item.at + item.length > size:
        raise AdapterError(
            [Problem(f"{where} ends at {item.at + item.length:,}, behind the file's {size:,}", (item.name,))]
        )
    tail = _pread(path, file, item.at + max(0, item.length - items.TAIL), item.at + item.length)
    inside = items.members(tail, item.length, where)
    pickled = next((m for n, m in inside.items() if n.endswith("/data.pkl")), None)
    if pickled is None or pickled.size > items.TAIL:
        raise AdapterError([Problem(f"{where} has no data.pkl: no item that torch.save wrote", (item.name,))])
    begin = _start(path, file, item, pickled, where)
    spec, key = items.record(_pread(path, file, begin, begin + pickled.size), where)
    wanted = TensorSpec(item.sizes, dtype)
    if spec != wanted:
        text = f"{where} is {list(spec.shape)} {spec.dtype}, expected {list(wanted.shape)} {wanted.dtype}"
        raise AdapterError([Problem(text, (item.name,))])
    data = next((m for n, m in inside.items() if n.endswith(f"/data/{key}")), None)
    if data is None or data.size != spec.nbytes:
        raise AdapterError([Problem(f"{where} has {data and data.size} bytes, expected {spec.nbytes:,}", (item.name,))])
    begin = _start(path, file, item, data, where)
    if begin + data.size > item.at + item.length:
        raise AdapterError([Problem(f"{where}: its bytes lie outside of it", (item.name,))])
    return begin


def _start(path: Path, file: int, item: Item, member: items.Member, where: str) -> int:
    """Where a member's own bytes begin: behind its local header."""
    at = item.at + member.at
    if not 0 <= member.at <= member.at + 30 + member.size <= item.length:
        raise AdapterError([Problem(f"{where}: a part of its zip lies outside of it", (item.name,))])
    head = _pread(path, file, at, at + 30)
    if head[:4] != b"PK\3\4":
        raise AdapterError([Problem(f"{where}: no part of a zip where its directory says so", (item.name,))])
    return at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def _pread(path: Path, file: int, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    disk.read_at(path, file, memoryview(data), start)
    return bytes(data)


def _opened(
    path: Path,
    specs: dict[str, TensorSpec],
    places: Mapping[Item, int],
    stamps: dict[str, disk.Stamp],
    left_out: tuple[str, ...],
) -> Opened:
    files, offsets, pieces = dict[str, str](), dict[str, int](), dict[str, list[Copy]]()
    for item, at in places.items():
        spec = specs[item.name]
        whole = item.sizes == spec.shape
        key = item.name if whole else f"{item.name}\0{','.join(map(str, item.offsets))}"
        files[key], offsets[key] = item.file, at
        if not whole:
            here, there = items.strides_of(item.sizes), items.strides_of(spec.shape)
            start = sum(o * s for o, s in zip(item.offsets, there, strict=True))
            pieces.setdefault(item.name, []).append(Copy(key, item.name, item.sizes, 0, here, start, there, spec.dtype))
    if not specs:
        raise AdapterError(f"{path} holds no tensors of a model, but {some(left_out)}")
    return Opened(specs, files, offsets, stamps, {n: tuple(copies) for n, copies in pieces.items()}, left_out)
