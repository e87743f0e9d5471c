"""Safetensors files before their data: the header needs only specs, so no shard is ever held in memory.

Tensors lie in the order in which the safetensors library lays them (widest dtype first, then by name); where another
writer had them in another order, or its header in other words, that header is kept, so that a checkpoint written back
is the same file, byte for byte.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fmoe.checkpoint.files.directory import DTYPES, Checkpoint
from fmoe.checkpoint.files.header import described
from fmoe.types import TensorSpec

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


@dataclass(frozen=True)
class Layout:
    """files: where each tensor goes. heads: file -> its bytes before the data, and its whole size. starts: where in
    its file each tensor begins.
    """

    files: dict[str, str]
    heads: dict[str, tuple[bytes, int]]
    starts: dict[str, int]

    @classmethod
    def of(
        cls,
        specs: Mapping[str, TensorSpec],
        files: Mapping[str, str],
        metadata: Mapping[str, Mapping[str, str]],
        heads: Mapping[str, bytes] = {},
    ) -> "Layout":
        """Tensors in these files, which hold these texts (by default `{"format": "pt"}`, as Transformers has it).

        heads: file -> the bytes before its data, where that says the same of the same tensors, in any order.
        """
        held: dict[str, dict[str, TensorSpec]] = {file: {} for file in sorted({*files.values(), *heads})}
        for name, file in files.items():
            held[file][name] = specs[name]
        made, starts = {}, dict[str, int]()
        for file, inside in held.items():
            head, at = _kept(file, inside, heads) or header(inside, metadata.get(file, {"format": "pt"}))
            made[file] = (head, len(head) + sum(spec.nbytes for spec in inside.values()))
            starts |= at
        return cls(dict(files), made, starts)

    @property
    def index(self) -> str | None:
        """The text of their index; one file needs none."""
        total = sum(size - len(head) for head, size in self.heads.values())
        return index_text(self.files, total) if len(self.heads) > 1 else None


def _kept(
    file: str, specs: Mapping[str, TensorSpec], heads: Mapping[str, bytes]
) -> tuple[bytes, dict[str, int]] | None:
    """The header that a file had, where it fits these tensors."""
    if file not in heads:
        return None
    found = described(Path(file), heads[file])
    return (heads[file], found.offsets) if found.specs == specs else None


def other_headers(source: Checkpoint) -> dict[str, str]:
    """The headers of its files that another writer made in its own way, or that have no tensors; by file."""
    held: dict[str, dict[str, TensorSpec]] = {file: {} for file in source.heads}
    for name, file in source.files.items():
        held[file][name] = source.specs[name]
    ours = {file: header(inside, source.metadata[file])[0] for file, inside in held.items() if inside}
    return {file: head[8:].decode() for file, head in source.heads.items() if ours.get(file) != head}


def index_text(files: Mapping[str, str], total: int) -> str:
    """model.safetensors.index.json, as Transformers writes it. total: bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
