"""A GGUF file before its data: metadata and order of an existing one, and where each tensor's bytes go.

What llama.cpp needs besides tensors (the architecture's sizes, the tokenizer) no table of rules can make, so it is
taken byte for byte from a file of the same model, whatever types that has. Tensors are of the same names and shapes in
both, or nothing is written.
"""

import struct
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from fmoe.checkpoint.files.containers.gguf import CODES, DTYPES, MAGIC, TYPES, File, Info
from fmoe.checkpoint.files.containers.gguf_files import read_files
from fmoe.checkpoint.files.containers.written import Framed
from fmoe.checkpoint.files.weights import OUT
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

NEEDED = """to='gguf' needs like=FILE.gguf (--like): llama.cpp reads sizes and the tokenizer from the file's metadata, \
which no checkpoint of tensors has. Fix: a GGUF of the same model, of any type"""
MADE = "rope_"
"""Tensors of these names llama.cpp's converter makes of the config: taken along as they are."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "MXFP4"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "MXFP4": 38}


class Like(NamedTuple):
    """The model whose metadata a new file takes."""

    files: list[File]

    @property
    def tensors(self) -> dict[str, tuple[File, Info]]:
        return {n: (file, info) for file in self.files for n, info in file.tensors.items()}

    def wider(self, specs: Mapping[str, TensorSpec]) -> frozenset[str]:
        """The tensors that are F32 there and of 16 bits here: norms and routers, as llama.cpp demands them."""
        mine = {n: info.type.name for n, (_, info) in self.tensors.items() if n in specs}
        return frozenset(n for n, t in mine.items() if t == "F32" and specs[n].dtype in (torch.float16, torch.bfloat16))

    def notes(self, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
        """What is otherwise than there."""
        here, found = self.files[0].path.name, []
        kinds = {n: info.type.name for n, (_, info) in self.tensors.items()}
        if other := [n for n, spec in specs.items() if _NAMES[spec.dtype] != kinds[n]]:
            types = ", ".join(sorted({_NAMES[specs[n].dtype] for n in other}))
            found.append(f"in their own types ({types}), not in those of {here}: {some(other)}")
        if made := [n for n in kinds if n not in specs]:
            found.append(f"taken along from {here}, with its metadata: {some(made)}")
        return tuple(found)


def like(path: "Path | str | None") -> Like:
    """Raises AdapterError where there is none."""
    if path is None:
        raise AdapterError(NEEDED)
    if not Path(path).exists():
        raise AdapterError(f"like={str(path)!r} is not there")
    return Like(read_files(Path(path)))


def gguf_layout(specs: Mapping[str, TensorSpec], model: Like) -> Framed:
    """Raises AdapterError naming the tensors that the other file has not, or in another shape, or alone."""
    _fits(specs, model)
    first, tensors = model.files[0], model.tensors
    infos, places, at = b"", dict[str, int](), 0
    for name, (_, info) in tensors.items():
        kind = TYPES[CODES[_NAMES[specs[name].dtype]]] if name in specs else info.type
        shape, encoded = info.shape[::-1], name.encode()
        infos += struct.pack("<Q", len(encoded)) + encoded + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", CODES[kind.name], at)
        places[name] = at
        at += -(-(prod(shape) // kind.values * kind.nbytes) // first.alignment) * first.alignment
    count, keys = _keys(specs, model)
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), count) + keys + infos
    head += bytes(-len(head) % first.alignment)
    starts = {n: len(head) + place for n, place in places.items()}
    kept = [(starts[n], file.read(i.at, i.at + i.nbytes)) for n, (file, i) in tensors.items() if n not in specs]
    return Framed(dict.fromkeys(specs, OUT), {OUT: (head, len(head) + at)}, {n: starts[n] for n in specs}, {OUT: kept})


def _fits(specs: Mapping[str, TensorSpec], model: Like) -> None:
    tensors, path = model.tensors, model.files[0].path
    problems = []
    if more := tuple(n for n in specs if n not in tensors):
        problems.append(Problem(f"{path} has no {some(more)}: is it of the same model?", more))
    if fewer := tuple(n for n in tensors if n not in specs and not n.startswith(MADE)):
        problems.append(
            Problem(f"{path} has {some(fewer)}, and the source gives none: is it of the same model?", fewer)
        )
    for name in (n for n in specs if n in tensors):
        dtype, found = specs[name].dtype, tensors[name][1].shape
        if dtype not in _NAMES or dtype == torch.uint8 and (not specs[name].shape or specs[name].shape[-1] % 17):
            text = f"{name!r} is {dtype} {list(specs[name].shape)}: GGUF has no such type that fmoe writes"
            problems.append(Problem(text, (name,)))
        elif _shape(specs[name]) != found:
            text = f"{name!r} is {list(_shape(specs[name]))}, and in {path} {list(found)}: is it of the same model?"
            problems.append(Problem(text, (name,)))
    if problems:
        raise AdapterError(problems)


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """Of the values, not of the bytes that hold them."""
    return (*spec.shape[:-1], spec.shape[-1] // 17 * 32) if spec.dtype == torch.uint8 else spec.shape


def _keys(specs: Mapping[str, TensorSpec], model: Like) -> tuple[int, bytes]:
    """How many entries the metadata has, and their bytes: as they were, but for what says how the file is stored."""
    first = model.files[0]
    kept = {n: first.read(key.start, key.stop) for n, key in first.keys.items() if not n.startswith("split.")}
    if model.notes(specs) and "general.file_type" in kept and first.keys["general.file_type"].kind == 4:
        sizes: Counter[str] = Counter()
        for spec in specs.values():
            sizes[_NAMES[spec.dtype]] += spec.nbytes
        most = next((n for n, _ in sizes.most_common() if n in _FILE_TYPES), "F32")
        kept["general.file_type"] = kept["general.file_type"][:-4] + struct.pack("<I", _FILE_TYPES[most])
    return len(kept), b"".join(kept.values())
