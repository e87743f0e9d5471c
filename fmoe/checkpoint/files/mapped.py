"""Tensors that are a file's bytes: mapped into memory, privately, so that only what is looked at is read.

Writing into one changes memory and never the file. The file must stay as it is for as long as they live.
"""

import mmap
import os
import threading
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.remote.address import Address

_STEP = 2**17  # bytes that Linux reads ahead at the least; of what it is asked for at once it may leave out the rest


class Maps:
    """The files that are mapped, each once, for as long as one of their tensors lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[mmap.mmap, torch.UntypedStorage]] = {}

    def __call__(self, source: Checkpoint, file: str) -> tuple[mmap.mmap, torch.UntypedStorage]:
        with self._lock:
            if file not in self._held:
                stamp = source.stamps[file]
                with disk.reading(source.path / file, stamp) as descriptor:
                    pages = mmap.mmap(cast(int, descriptor), stamp.size, access=mmap.ACCESS_COPY)
                self._held[file] = pages, torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
            return self._held[file]


def mapped(source: Checkpoint, names: Iterable[str], maps: Maps | None = None) -> dict[str, Tensor]:
    """The tensors of these names, without reading them. maps: the files that are mapped already; more are put in.

    Raises AdapterError where a file is not what it was.
    """
    if isinstance(source.path, Address):
        return source.read(names)
    maps = maps or Maps()
    out: dict[str, Tensor] = {}
    for name in names:
        (shape, dtype), at = source.specs[name], source.offsets.get(name, 1)
        if at % dtype.itemsize or name in source.pieces:  # safetensors allows it; torch does not
            out |= source.read([name])
            continue
        _, storage = maps(source, source.files[name])
        strides = torch.empty(shape, device="meta").stride()
        out[name] = torch.empty(0, dtype=dtype).set_(storage, at // dtype.itemsize, shape, strides)
    return out


def fetch(source: Checkpoint, name: str, part: Tensor, maps: Maps) -> None:
    """Begins to read what a part of a mapped tensor covers, if that is one run, and has the system read no more."""
    if name in source.pieces or isinstance(source.path, Address):
        return
    item, file = part.element_size(), source.files[name]
    span = sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True)) + 1
    if not part.numel() or span != part.numel() or source.offsets[name] % item or not hasattr(mmap, "MADV_RANDOM"):
        return
    start, end = int(part.storage_offset()) * item, (int(part.storage_offset()) + span) * item
    first = start - start % mmap.PAGESIZE
    maps(source, file)[0].madvise(mmap.MADV_RANDOM, first, end - first)  # a page looked at brings no others with it
    with disk.reading(source.path / file, source.stamps[file]) as descriptor:
        for at in range(start, end, _STEP):
            os.posix_fadvise(cast(int, descriptor), at, min(_STEP, end - at), os.POSIX_FADV_WILLNEED)
