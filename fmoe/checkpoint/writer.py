"""Safetensors files written tensor by tensor: the header needs only specs, so no shard is ever held in memory.

Tensors lie in the order in which the safetensors library lays them (widest dtype first, then by name), so that a
checkpoint written back is the same file, byte for byte.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fmoe.checkpoint.files import DTYPES
from fmoe.types import TensorSpec, bits

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# how the safetensors library ranks dtypes; it lays them from the end of this list to its start
_RANK = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64"]
_RANK += ["F64", "I64", "U64"]


def header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins."""
    order = sorted(specs, key=lambda n: (-_RANK.index(_CODES[specs[n].dtype]), n))
    at, entries, starts = 0, {}, {}
    for name in order:
        spec, starts[name] = specs[name], at
        at += spec.nbytes
        entries[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], at],
        }
    said = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(said | entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {n: 8 + len(text) + start for n, start in starts.items()}


def shard(specs: Mapping[str, TensorSpec], max_shard_size: int) -> dict[str, str]:
    """Name -> file: names in order, a new file where one more would exceed the size."""
    numbers, number, size = {}, 0, 0
    for name in specs:
        if size and size + specs[name].nbytes > max_shard_size:
            number, size = number + 1, 0
        numbers[name] = number
        size += specs[name].nbytes
    if not number:
        return dict.fromkeys(numbers, "model.safetensors")
    return {n: f"model-{i + 1:05d}-of-{number + 1:05d}.safetensors" for n, i in numbers.items()}


class Writer:
    """The files of a checkpoint being written: `write` puts a tensor at its place, in any order."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], files: Mapping[str, str]):
        self.path, self.specs, self.files = path, specs, files
        self.at: dict[str, int] = {}
        self.todo = set(specs)
        self.names: list[str] = []

    def part(self, name: str) -> Path:
        """Where to write a file that gets this name in the end."""
        part = self.path / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        self.names.append(name)
        return part

    def begin(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Every safetensors file with its header, and room for its tensors."""
        held: dict[str, dict[str, TensorSpec]] = {file: {} for file in sorted(set(self.files.values()))}
        for name, file in self.files.items():
            held[file][name] = self.specs[name]
        for file, specs in held.items():
            head, at = header(specs, metadata.get(file, {"format": "pt"}))
            self.at |= at
            with open(self.part(file), "wb") as out:
                out.write(head)
                out.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))

    def write(self, name: str, tensor: Tensor) -> None:
        """The tensor's bytes, in the order of its shape."""
        spec = self.specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == tuple(spec) and name in self.todo, name
        with open(self.path / f"{self.files[name]}.part", "r+b") as out:  # opened anew: shards may be many
            out.seek(self.at[name])
            out.write(bits(tensor.cpu()).numpy().data)
        self.todo.remove(name)


@contextmanager
def writing(
    path: Path,
    specs: Mapping[str, TensorSpec],
    files: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, str]],
) -> Iterator[Writer]:
    """A Writer whose files bear a `.part` name until all of them are whole; an error leaves none with its own name."""
    writer = Writer(path, specs, files)
    try:
        writer.begin(metadata)
        yield writer
        assert not writer.todo, writer.todo
        for name in writer.names:
            os.replace(path / f"{name}.part", path / name)
    finally:
        for name in writer.names:
            (path / f"{name}.part").unlink(missing_ok=True)


def index_text(files: Mapping[str, str], specs: Iterable[TensorSpec]) -> str:
    """model.safetensors.index.json, as Transformers writes it."""
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": dict(files)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
