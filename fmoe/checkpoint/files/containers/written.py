"""A torch DCP directory before its data: where each tensor's bytes go, and everything around them."""

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fmoe.checkpoint.files.containers.items import frame
from fmoe.checkpoint.files.weights import METADATA
from fmoe.checkpoint.files.writer import Layout
from fmoe.types import TensorSpec


@dataclass(frozen=True)
class Framed(Layout):
    """frames: of each file, what else than its first bytes is known before the data, and where it goes."""

    frames: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)


def dcp_layout(specs: Mapping[str, TensorSpec], most: int, megatron: bool) -> tuple[Framed, dict[str, bytes]]:
    """The layout, and the small files: what `torch.distributed.checkpoint.load` reads, and Megatron-Core beside it."""
    files, starts, sizes = dict[str, str](), dict[str, int](), dict[str, int]()
    frames: dict[str, list[tuple[int, bytes]]] = {}
    items: dict[str, tuple[str, int, int]] = {}
    number = 0
    for name, spec in specs.items():
        made = frame(spec)
        length = len(made.head) + spec.nbytes + len(made.tail)
        if sizes.get(f"__0_{number}.distcp", 0) and sizes[f"__0_{number}.distcp"] + length > most:
            number += 1
        file = f"__0_{number}.distcp"
        at = sizes.setdefault(file, 0)
        files[name], starts[name], items[name] = file, at + len(made.head), (file, at, length)
        frames.setdefault(file, []).extend([(at, made.head), (at + len(made.head) + spec.nbytes, made.tail)])
        sizes[file] += length
    heads = {file: (frames[file][0][1], size) for file, size in sizes.items()}
    small = {METADATA: _metadata(specs, items)}
    if megatron:
        empty = io.BytesIO()
        torch.save({}, empty)
        small |= {
            "metadata.json": b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}',
            "common.pt": empty.getvalue(),
        }
    return Framed(files, heads, starts, {file: more[1:] for file, more in frames.items()}), small


def _metadata(specs: Mapping[str, TensorSpec], items: Mapping[str, tuple[str, int, int]]) -> bytes:
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as meta

    listed, stored = {}, {}
    for name, (shape, dtype) in specs.items():
        origin = torch.Size([0] * len(shape))
        chunks = [meta.ChunkStorageMetadata(origin, torch.Size(shape))]
        properties = meta.TensorProperties(dtype=dtype)
        listed[name] = meta.TensorStorageMetadata(properties, torch.Size(shape), chunks)
        stored[meta.MetadataIndex(name, origin, 0)] = filesystem._StorageInfo(*items[name])
    return pickle.dumps(meta.Metadata(listed, {n: (n,) for n in specs}, stored, meta.StorageMeta()))  # type: ignore[arg-type]
