"""The header of a safetensors file: a length in 8 bytes, JSON, then the tensors side by side.

Read here and not by the library (https://github.com/huggingface/safetensors), so that a directory of 47,000 tensors
opens in a fraction of a second and it is known where each tensor lies. What the library refuses is refused here, and
so is what it lets pass and a conversion would lose: a tensor described twice, fields that nobody knows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmoe.checkpoint.files.disk import AGAIN, Opened, Stamp, read_at, reading
from fmoe.checkpoint.files.strict import MOST, parse, short, too_long
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.checkpoint.remote.kept import keep, kept
from fmoe.types import AdapterError, Problem, TensorSpec

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_PACKED = {"F4", "F6_E2M3", "F6_E3M2"}  # elements of less than a byte
_FIELDS = {"dtype", "shape", "data_offsets"}
FIRST = 2**16  # bytes of a file elsewhere that are asked for at once: most headers are shorter
_RANK = 64  # dimensions, as in NumPy
_BEYOND = 2**63  # the first number that is no size to torch

PICKLE = "a pickle, which may run code when it is opened and is not read here: convert it to safetensors first"
_KINDS = {
    b"PK\x03\x04": f"it is what torch.save writes, {PICKLE}",
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"GGUF": "it is GGUF: `fmoe convert X.gguf HF --to hf --config JSON`",
    b"\x89HDF": "it is HDF5: convert it to safetensors first",
    b"<": "it is a web page: the download went wrong",
    b"\0\0\0\0\0\0\0\0": f"it begins with zeros, as an unfinished download does: {AGAIN}",
} | {bytes([0x80, n]): f"it is {PICKLE}" for n in range(2, 6)}


class Header(NamedTuple):
    """What a safetensors file says of itself. offsets: where in the file each tensor's bytes begin. end: where the
    last ends. text: the bytes before the data.
    """

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    offsets: dict[str, int]
    end: int
    text: bytes
    stamp: Stamp = Stamp()


def read_header(path: Where, missing: str = "is not there", root: Path | None = None) -> Header:
    """The header of a safetensors file. Raises AdapterError where the header is none, or not the file's.

    missing, root: as `reading` has them.
    """
    with reading(path, missing=missing, parts=True, root=root) as file:
        stamp = Stamp.of(file)
        text = kept(file) if isinstance(file, Address) else None
        if text is None:
            text = _text(path, file, stamp)
            if isinstance(file, Address):
                keep(file, text)
    found = described(path, text)
    if found.end != stamp.size:
        why = f"cut short: {AGAIN}" if found.end > stamp.size else "no tensor has the rest"
        raise AdapterError(f"{path} has {stamp.size:,} bytes, its header says {found.end:,}: {why}")
    return found._replace(stamp=stamp)


def _text(path: Where, file: Opened, stamp: Stamp) -> bytes:
    """The bytes before the data."""
    first = bytearray(min(stamp.size, FIRST if isinstance(file, Address) else 64))
    read_at(path, file, memoryview(first), 0)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or 8 + length > stamp.size or length > MOST:
        why = _kind(first, f"cut short, or no safetensors file: {AGAIN}")
        raise AdapterError(f"{path} has {stamp.size:,} bytes, and its header would have {length:,}: {why}")
    text = bytearray(8 + length)
    held = min(len(first), len(text))
    text[:held] = first[:held]
    read_at(path, file, memoryview(text)[held:], held)
    return bytes(text)


def described(path: Where, text: bytes) -> Header:
    """What the bytes before the data say; path: of whom. Raises AdapterError where they are no header."""
    length = len(text) - 8
    try:
        header = parse(text[8:])
        metadata = _texts(header.pop("__metadata__", None))
    except (ValueError, TypeError) as error:
        why = error if length else _kind(text, str(error))
        raise AdapterError(f"{path} has no safetensors header: {why}") from None
    specs = _specs(path, header)
    end = 8 + length + _tiled(path, header, specs)
    return Header(specs, metadata, {n: 8 + length + h["data_offsets"][0] for n, h in header.items()}, end, text)


def _kind(first: bytes | bytearray, otherwise: str) -> str:
    """What a file that is no safetensors seems to be instead."""
    return next((kind for magic, kind in _KINDS.items() if first.startswith(magic)), otherwise)


def _texts(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError(f"__metadata__ is {short(metadata)}, expected texts by name")
    return metadata


def _specs(path: Where, header: Mapping[str, Any]) -> dict[str, TensorSpec]:
    specs, problems = {}, []
    for name, entry in header.items():
        if wrong := too_long(name) or _wrong(entry):
            problems.append(Problem(f"{path}: {short(name)} {wrong}", (name,)))
        else:
            specs[name] = TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if len(problems) > 8:
        more = tuple(p.keys[0] for p in problems[8:])
        problems[8:] = [Problem(f"{path}: {len(more):,} more tensors are wrong", more)]
    if problems:
        raise AdapterError(problems)
    return specs


def _wrong(entry: Any) -> str:
    """Why a tensor cannot be described so; empty if it can."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        return f"is {short(entry)}, expected dtype, shape and data_offsets, and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        why = " (elements of less than a byte are not read here)" if str(dtype) in _PACKED else ""
        return f"has dtype {short(dtype)}{why}, expected one of {', '.join(DTYPES)}"
    if not _counts(shape) or len(shape) > _RANK:
        return f"has shape {short(shape)}, expected at most {_RANK} whole numbers from 0 to 2**63"
    if 0 in shape and TensorSpec(tuple(n or 1 for n in shape), DTYPES[dtype]).nbytes >= _BEYOND:
        return f"has shape {short(shape)}, without elements, but too large for strides"
    if not _counts(offsets) or len(offsets) != 2:
        return f"has data_offsets {short(offsets)}, expected two whole numbers: where it begins and ends"
    return ""


def _counts(found: Any) -> bool:
    if type(found) is not list:
        return False
    for n in found:
        if type(n) is not int or not 0 <= n < _BEYOND:
            return False
    return True


def _tiled(path: Where, header: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> int:
    """Where the data ends. Raises AdapterError where the tensors do not lie side by side, each as long as its spec."""
    at, last = 0, None
    for (start, stop), name in sorted((entry["data_offsets"], name) for name, entry in header.items()):
        spec = specs[name]
        if start == at and stop - start == spec.nbytes:
            at, last = stop, name
            continue
        if start != at:
            before = "the header" if last is None else short(last)
            what = f"a hole after {before}" if start > at else f"inside {before}"
            why = f"begins at {start:,}, {what}, expected {at:,}"
        else:
            dtype = header[name]["dtype"]
            why = f"lies at {start:,}:{stop:,}, expected {spec.nbytes:,} bytes, as {dtype} {list(spec.shape)} has"
        raise AdapterError([Problem(f"{path}: {short(name)} {why}", (name,))])
    return at
