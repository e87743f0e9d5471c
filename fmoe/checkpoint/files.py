"""A checkpoint directory as a value: its config, the spec and file of every tensor, and what else lies there.

Reads safetensors headers itself (a length, JSON, then bytes: https://github.com/huggingface/safetensors), so that a
directory of 47,000 tensors opens in a fraction of a second and no tensor is touched.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fmoe.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

INDEX = "model.safetensors.index.json"
NATIVE = "fmoe.json"
ORIGIN = {"weight_map": dict, "metadata": dict, "index": str | None, "bytes": int}
_MOST = 100_000_000  # bytes of a header, as in the safetensors library

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


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds.

    offsets: where in its file each tensor's bytes begin. index: the text of its index file. origin: of a native one,
    what it was made from: the HF `weight_map`, the files' metadata, the index and the size; None for a HF one.
    """

    path: Path
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    files: dict[str, str]
    offsets: dict[str, int]
    index: str | None = None
    origin: dict[str, Any] | None = None
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        return self.origin is not None

    @property
    def model_type(self) -> str:
        if "model_type" not in self.config:
            raise AdapterError(f"{self.path / 'config.json'} has no model_type")
        return str(self.config["model_type"])

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def _open(self) -> dict[str, Any]:
        return {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, mapped from their files."""
        out = {}
        for name in names:
            file = self.files[name]
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            out[name] = self._open[file].get_tensor(name)
        return out

    def others(self) -> list[Path]:
        """Every other file of the directory, relative to it: tokenizer, config and so on, but no weights."""
        weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".part"}
        found = (p.relative_to(self.path) for p in sorted(self.path.rglob("*")) if p.is_file())
        ours = {INDEX, NATIVE}
        return [p for p in found if p.suffix not in weights and p.name not in ours and not p.parts[0].startswith(".")]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in a directory of safetensors files with a config.json, HF or native; only headers are read.

    Raises AdapterError naming the file: none there, an index that disagrees with the files, a header that is not one.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterError(f"{path} is {'no directory' if path.exists() else 'not there'}")
    config = _json(path / "config.json", "a checkpoint directory has one")
    index = (path / INDEX).read_bytes().decode(errors="replace") if (path / INDEX).exists() else None
    mapped = _weight_map(path / INDEX, _json(path / INDEX)) if index is not None else None
    files = sorted({p.name for p in path.glob("*.safetensors")} if mapped is None else set(mapped.values()))
    specs: dict[str, TensorSpec] = {}
    where: dict[str, str] = {}
    offsets: dict[str, int] = {}
    metadata = {}
    for file in files:
        if not (path / file).is_file():
            raise AdapterError(f"{path / file} is not there{f', and {INDEX} names it' if mapped is not None else ''}")
        found, metadata[file], begins = read_header(path / file)
        if twice := [n for n in found if n in where]:
            raise AdapterError([Problem(f"{some(twice)}: in {where[twice[0]]} and in {file}", tuple(twice))])
        specs |= found
        where |= dict.fromkeys(found, file)
        offsets |= begins
    if not specs:
        raise AdapterError(f"{path} holds no tensors in safetensors files")
    if mapped is not None and mapped != where:
        wrong = tuple(n for n in {**mapped, **where} if mapped.get(n) != where.get(n))
        text = f"{path / INDEX} and the files' headers disagree on where these are: {some(wrong)}"
        raise AdapterError([Problem(text, wrong)])
    origin = _json(path / NATIVE) if (path / NATIVE).exists() else None
    if origin is not None:
        _weight_map(path / NATIVE, origin)
        if not all(n in origin and isinstance(origin[n], kind) for n, kind in ORIGIN.items()):
            raise AdapterError(f"{path / NATIVE} does not say what {path} was made from: {', '.join(ORIGIN)}")
    return Checkpoint(path, config, specs, where, offsets, index, origin, metadata)


class Header(NamedTuple):
    """What a safetensors file says of itself. offsets: where in the file each tensor's bytes begin."""

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    offsets: dict[str, int]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises AdapterError where the header is none, or not the file's."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size or length > _MOST:
            why = "cut short, a Git LFS pointer, or no safetensors"
            raise AdapterError(f"{path} has {size:,} bytes, and its header would have {length:,}: {why}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        specs = {n: TensorSpec(tuple(h["shape"]), DTYPES[h["dtype"]]) for n, h in header.items()}
        end = _tiled(header, specs)
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"metadata {metadata}, expected texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path} has no safetensors header: {type(error).__name__}: {error}") from None
    if 8 + length + end != size:
        raise AdapterError(f"{path} has {size:,} bytes, its header says {8 + length + end:,}")
    return Header(specs, metadata, {n: 8 + length + h["data_offsets"][0] for n, h in header.items()})


def _tiled(header: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> int:
    """Where the data ends. Raises ValueError where the tensors do not lie side by side, each as long as its spec."""
    at = 0
    for name in sorted(specs, key=lambda n: header[n]["data_offsets"]):
        (start, stop), shape = header[name]["data_offsets"], specs[name].shape
        if start != at or stop != at + specs[name].nbytes or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"{name!r} {list(shape)} lies at {start}:{stop}, expected from {at} and as long as it is")
        at = stop
    return at


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The weight_map of an index, which is at path: names to safetensors files in the same directory."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise AdapterError(f"{path} has no weight_map of names to files")
    for file in set(found.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise AdapterError(f"{path} names the file {file!r}: expected safetensors in {path.parent}")
    return found


def _json(path: Path, why: str = "") -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing{': ' if why else ''}{why}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path} holds a {type(found).__name__}, expected an object")
    return found
