"""A checkpoint directory as a value: its config, the spec and place of every tensor, and what else lies there.

Only headers and JSON are read to open one; every file is checked as `disk`, `strict` and `header` have it, and all of
them together here: an index, the files that it names and their headers say the same, or nothing is opened.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.header import DTYPES, PICKLE, Header, read_header
from fmoe.checkpoint.files.origin import origin_of, weight_map
from fmoe.checkpoint.files.strict import MOST, parse
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

__all__ = ["DTYPES", "INDEX", "NATIVE", "Checkpoint", "open_checkpoint", "read_header"]

INDEX = "model.safetensors.index.json"
NATIVE = "fmoe.json"
JOURNAL = "fmoe.journal"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".part"} | PICKLES
_SHARD = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds.

    offsets: where in its file each tensor's bytes begin. stamps: what each file was when its header was read.
    index: the text of its index file. origin: of a native one, what it was made from: the HF `weight_map`, the files'
    metadata, the index and the size; None for a HF one.
    """

    path: Path
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    files: dict[str, str]
    offsets: dict[str, int]
    stamps: dict[str, disk.Stamp]
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

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, in memory of their own.

        Raises AdapterError where a file is no longer what it was when it was opened: cut short, replaced, written to.
        """
        names = list(names)
        out: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.files[n] for n in names):
            path = self.path / file
            with disk.reading(path, self.stamps[file]) as descriptor:
                for name in (n for n in names if self.files[n] == file):
                    shape, dtype = self.specs[name]
                    data = torch.empty(self.specs[name].nbytes, dtype=torch.uint8)
                    disk.read_at(path, descriptor, data.numpy().data, self.offsets[name])
                    out[name] = data.view(dtype).view(shape)
                disk.unchanged(path, descriptor, self.stamps[file])
        return {n: out[n] for n in names}

    def unchanged(self) -> None:
        """Raises AdapterError where a file is no longer the one whose header was read."""
        for file, stamp in self.stamps.items():
            with disk.reading(self.path / file, stamp):
                pass

    def others(self) -> list[Path]:
        """Every other file of the directory, relative to it: tokenizer, config and so on, but no weights.

        Raises AdapterError for one that may not be copied, as a link that leads out of the directory.
        """
        ours = {INDEX, NATIVE}
        return list(disk.others(self.path, lambda p: p.suffix not in WEIGHTS and p.name not in ours))


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint in a directory of safetensors files with a config.json, HF or native; only headers are read.

    Raises AdapterError naming the file: none there, an index that disagrees with the files, a header that is not one.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterError(f"{path} is {'no directory' if path.exists() else 'not there'}")
    try:
        there = sorted(os.listdir(path))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
    if JOURNAL in there:
        raise AdapterError(f"{path} is unfinished: {JOURNAL} tells of a conversion that was interrupted; run it again")
    config, _ = _json(path / "config.json", infinite=True)
    index = mapped = origin = None
    if INDEX in there:
        found, index = _json(path / INDEX)
        mapped = weight_map(path / INDEX, found)
    if NATIVE in there:
        origin = origin_of(path / NATIVE, _json(path / NATIVE)[0])
    files = _found(path, there) if mapped is None else sorted(set(mapped.values()))
    missing = "is not there" if mapped is None else f"is not there, and {INDEX} names it"
    headers = {file: read_header(path / file, missing) for file in files}
    where = _where(path, headers)
    if not where:
        raise AdapterError(f"{path} holds no tensors in safetensors files{_instead(there)}")
    if mapped is not None and mapped != where:
        wrong = tuple(n for n in {**mapped, **where} if mapped.get(n) != where.get(n))
        text = f"{path / INDEX} and the files' headers disagree on where these are: {some(wrong)}"
        raise AdapterError([Problem(text, wrong)])
    specs = {n: spec for header in headers.values() for n, spec in header.specs.items()}
    offsets = {n: at for header in headers.values() for n, at in header.offsets.items()}
    stamps = {file: header.stamp for file, header in headers.items()}
    metadata = {file: header.metadata for file, header in headers.items()}
    return Checkpoint(path, config, specs, where, offsets, stamps, index, origin, metadata)


def _where(path: Path, headers: Mapping[str, Header]) -> dict[str, str]:
    """The file of each tensor. Raises AdapterError where two files hold the same one."""
    where: dict[str, str] = {}
    for file, header in headers.items():
        if twice := [n for n in header.specs if n in where]:
            raise AdapterError([Problem(f"{path}: {some(twice)}: in {where[twice[0]]} and in {file}", tuple(twice))])
        where |= dict.fromkeys(header.specs, file)
    return where


def _found(path: Path, there: Iterable[str]) -> list[str]:
    """The safetensors files of a directory without an index. Raises AdapterError where some of N are missing."""
    files = [n for n in there if n.endswith(".safetensors")]
    for file in files:
        if not file.isprintable():
            raise AdapterError(f"{path} has a file named {file!r}: rename it")
        if shard := _SHARD.fullmatch(file):
            stem, _, end, count = shard.groups()
            wanted = (f"{stem}{i + 1:05d}{end}" for i in range(int(count)))
            if missing := next((n for n in wanted if n not in files), None):
                raise AdapterError(f"{path / missing} is not there, and {file} is: download it, or {INDEX}")
    return files


def _instead(there: Iterable[str]) -> str:
    pickles = [n for n in there if Path(n).suffix in PICKLES]
    return f", but {some(pickles)}: {PICKLE}" if pickles else ""


def _json(path: Path, *, infinite: bool = False) -> tuple[dict[str, Any], str]:
    """What a file of JSON holds, and its text."""
    missing = "is missing: a checkpoint directory has one"
    with disk.reading(path, missing=missing) as file:
        size = disk.Stamp.of(file).size
        if size > MOST:
            raise AdapterError(f"{path} has {size:,} bytes, expected at most {MOST:,}")
        text = bytearray(size)
        disk.read_at(path, file, memoryview(text), 0)
    try:
        return parse(bytes(text), infinite=infinite), text.decode()
    except ValueError as error:
        raise AdapterError(f"{path} is no JSON: {error}") from None
    except TypeError as error:
        raise AdapterError(f"{path} {error}") from None
