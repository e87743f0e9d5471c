"""Tensors that are a file's bytes: mapped into memory, privately, so that only what is looked at is read.

Writing into one changes memory and never the file. The file must stay as it is for as long as they live.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from fmoe.checkpoint import disk
from fmoe.checkpoint.files import Checkpoint

_STEP = 2**17  # bytes that Linux reads ahead at the least; of what it is asked for at once it may leave out the rest


Maps = dict[str, torch.UntypedStorage]


def mapped(source: Checkpoint, names: Iterable[str], maps: Maps | None = None) -> dict[str, Tensor]:
    """The tensors of these names, without reading them. maps: the files that are mapped already; more are put in.

    Raises AdapterError where a file is not what it was.
    """
    storages = {} if maps is None else maps
    out: dict[str, Tensor] = {}
    for name in names:
        file, (shape, dtype), at = source.files[name], source.specs[name], source.offsets[name]
        if at % dtype.itemsize:  # safetensors allows it; torch does not
            out |= source.read([name])
            continue
        if file not in storages:
            stamp = source.stamps[file]
            with disk.reading(source.path / file, stamp):
                storages[file] = torch.UntypedStorage.from_file(str(source.path / file), False, stamp.size)  # type: ignore
        strides = torch.empty(shape, device="meta").stride()
        out[name] = torch.empty(0, dtype=dtype).set_(storages[file], at // dtype.itemsize, shape, strides)
    return out


def fetch(source: Checkpoint, name: str, part: Tensor) -> None:
    """Begins to read what a part of a mapped tensor covers, if that is one run; by itself the system reads more."""
    item, file = part.element_size(), source.files[name]
    size = part.untyped_storage().nbytes() if part.numel() else 0
    span = sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True)) + 1
    if span == part.numel() and size == source.stamps[file].size and hasattr(os, "posix_fadvise"):
        start, end = int(part.storage_offset()) * item, (int(part.storage_offset()) + span) * item
        with disk.reading(source.path / file, source.stamps[file]) as descriptor:
            for at in range(start, end, _STEP):
                os.posix_fadvise(descriptor, at, min(_STEP, end - at), os.POSIX_FADV_WILLNEED)
