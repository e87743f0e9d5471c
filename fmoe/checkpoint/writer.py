"""Safetensors files written tensor by tensor: the header needs only specs, so no shard is ever held in memory.

Tensors lie in the order in which the safetensors library lays them (widest dtype first, then by name), so that a
checkpoint written back is the same file, byte for byte.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

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
    at, entries = 0, {}
    for name in order:
        spec = specs[name]
        span = [at, at + spec.nbytes]
        entries[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        at += spec.nbytes
    said = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(said | entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + e["data_offsets"][0] for n, e in entries.items()}


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
    """Files of a checkpoint, open for writing: `write` puts a tensor at its place, in any order.

    Files bear a `.part` name until `close` has seen every tensor; an error leaves no file with a final name.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        files: Mapping[str, str],
        metadata: Mapping[str, Mapping[str, str]],
    ):
        self.path, self.specs, self.files = path, specs, files
        self.todo = set(specs)
        self.at: dict[str, int] = {}
        self.open: dict[str, BinaryIO] = {}
        for file in sorted(set(files.values())):
            mine = {n: specs[n] for n, f in files.items() if f == file}
            head, at = header(mine, metadata.get(file, {"format": "pt"}))
            self.at |= at
            self.open[file] = open(path / f"{file}.part", "wb")
            self.open[file].write(head)
            self.open[file].truncate(len(head) + sum(spec.nbytes for spec in mine.values()))

    def write(self, name: str, tensor: Tensor) -> None:
        """The tensor's bytes, in the order of its shape."""
        spec = self.specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == tuple(spec) and name in self.todo, name
        file = self.open[self.files[name]]
        file.seek(self.at[name])
        file.write(bits(tensor.cpu()).numpy().data)
        self.todo.remove(name)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.open.values():
            file.close()
        for file in self.open:
            part = self.path / f"{file}.part"
            if kind is None:
                assert not self.todo, self.todo
                os.replace(part, self.path / file)
            else:
                part.unlink(missing_ok=True)


def index_text(files: Mapping[str, str], specs: Iterable[TensorSpec]) -> str:
    """model.safetensors.index.json, as Transformers writes it."""
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": dict(files)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
