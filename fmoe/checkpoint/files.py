"""A checkpoint directory as a value: its config, the spec and file of every tensor, and what else lies there.

Reads safetensors headers itself (a length, JSON, then bytes: https://github.com/huggingface/safetensors), so that a
directory of 47,000 tensors opens in a fraction of a second and no tensor is touched.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fmoe.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

INDEX = "model.safetensors.index.json"
NATIVE = "fmoe.json"

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
    """What a directory holds. index: the text of its index file. origin: of a native one, what it was made from:
    the HF `weight_map`, the files' metadata and the index; None for a HF one.
    """

    path: Path
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    files: dict[str, str]
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
        weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
        found = (p.relative_to(self.path) for p in sorted(self.path.rglob("*")) if p.is_file())
        ours = {INDEX, NATIVE}
        return [p for p in found if p.suffix not in weights and p.name not in ours and not p.parts[0].startswith(".")]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in a directory of safetensors files with a config.json, HF or native; only headers are read.

    Raises AdapterError naming the file: none there, an index that disagrees with the files, a header that is not one.
    """
    path = Path(path)
    config = _json(path / "config.json", "a checkpoint directory has one")
    index = _json(path / INDEX) if (path / INDEX).exists() else None
    files = sorted(set(index["weight_map"].values())) if index else sorted(p.name for p in path.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{path} holds no safetensors files")
    specs: dict[str, TensorSpec] = {}
    where: dict[str, str] = {}
    metadata = {}
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise AdapterError(f"{path / INDEX} names the file {file!r}, which is not in {path}")
        found, metadata[file] = read_header(path / file)
        if twice := [n for n in found if n in where]:
            raise AdapterError([Problem(f"{some(twice)}: in {where[twice[0]]} and in {file}", tuple(twice))])
        specs |= found
        where |= dict.fromkeys(found, file)
    if index and index["weight_map"] != where:
        wrong = tuple(n for n in {**index["weight_map"], **where} if index["weight_map"].get(n) != where.get(n))
        text = f"{path / INDEX} and the files' headers disagree on where these are: {some(wrong)}"
        raise AdapterError([Problem(text, wrong)])
    origin = _json(path / NATIVE) if (path / NATIVE).exists() else None
    text = (path / INDEX).read_text() if index else None
    return Checkpoint(path, config, specs, where, text, origin, metadata)


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Every tensor's spec, and the file's metadata. Raises AdapterError where the header is none."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        return {n: TensorSpec(tuple(h["shape"]), DTYPES[h["dtype"]]) for n, h in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise AdapterError(f"{path} is no safetensors file: {type(error).__name__}: {error}") from None


def _json(path: Path, why: str = "") -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing{': ' if why else ''}{why}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise AdapterError(f"{path} holds a {type(found).__name__}, expected an object")
    return dict(found)
