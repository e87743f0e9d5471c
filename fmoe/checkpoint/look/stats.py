"""Tensors of a checkpoint, one by one: where they lie, and what their numbers are like. Streamed."""

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fmoe.checkpoint.files.directory import Checkpoint, open_checkpoint
from fmoe.checkpoint.files.header import read_header
from fmoe.checkpoint.files.mapped import mapped
from fmoe.checkpoint.remote.address import place
from fmoe.folding import meant
from fmoe.layout.claims import some
from fmoe.types import AdapterError

PART = 2**22  # numbers looked at together


def tensors(path: Path | str, pattern: str = "*", *, stats: bool = False) -> Iterator[dict[str, Any]]:
    """{name, shape, dtype, file, offset, bytes} of every tensor whose name fits `pattern`, in the order of names.

    path: a checkpoint directory, or one safetensors file. pattern: a name, or a glob such as `*.experts.0.*`.
    stats: min, max and mean of what is finite, and how many NaN and Inf there are; memory stays at a few MB.
    Raises AdapterError where no name fits.
    """
    source = opened(path)
    names = [n for n in sorted(source.specs) if n == pattern or fnmatch.fnmatchcase(n, pattern)]
    if not names:
        numbers_of = re.compile(r"\d+").findall
        near = meant(pattern, (n for n in source.specs if numbers_of(n) == numbers_of(pattern)))  # few of 46,000
        raise AdapterError(f"no tensor of {path} is named {pattern!r}: found {some(sorted(source.specs))}{near}")
    for name in names:
        spec = source.specs[name]
        row: dict[str, Any] = {"name": name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        row |= {"file": source.files[name], "offset": source.offsets[name], "bytes": spec.nbytes}
        yield row | (numbers(mapped(source, [name])[name]) if stats else {})


def opened(path: Path | str, own: bool = False) -> Checkpoint:
    """A checkpoint directory, or one safetensors file as if it were alone in one. own: as in `open_checkpoint`."""
    place(path)
    if not Path(path).is_file():
        return open_checkpoint(path, own=own)
    file = Path(path)
    header = read_header(file, "is not there")
    return Checkpoint(
        file.parent,
        {},
        dict(header.specs),
        dict.fromkeys(header.specs, file.name),
        dict(header.offsets),
        {file.name: header.stamp},
        metadata={file.name: header.metadata},
    )


def numbers(tensor: Tensor) -> dict[str, Any]:
    """{min, max, mean, nan, inf}: min, max and mean of the finite numbers, in fp64; None where there are none.

    >>> import torch
    >>> numbers(torch.tensor([1.0, 3.0, float("nan"), float("inf")]))
    {'min': 1.0, 'max': 3.0, 'mean': 2.0, 'nan': 1, 'inf': 1}
    """
    least, most, total, count, nan, inf = float("inf"), float("-inf"), 0.0, 0, 0, 0
    for part in tensor.reshape(-1).split(PART):
        values = part.abs().double() if part.is_complex() else part.double()
        finite = values[values.isfinite()]
        nan, inf = nan + int(values.isnan().sum()), inf + int(values.isinf().sum())
        if len(finite):
            least, most = min(least, float(finite.min())), max(most, float(finite.max()))
            total, count = total + float(finite.sum()), count + len(finite)
    told = (least, most, total / count) if count else (None, None, None)
    return dict(zip(("min", "max", "mean"), told, strict=True)) | {"nan": nan, "inf": inf}
