"""Every format, its shapes, and numbers drawn for it."""

import pytest
import torch
from torch import Tensor

from fmoe.codecs.formats import FORMATS as TABLE
from fmoe.codecs.formats import Format
from fmoe.types import bits

FORMATS = {n: f for n, f in TABLE.items() if not f.second}  # scales of scales: test_foreign.py
ALL = pytest.mark.parametrize("name", FORMATS)


def shape_of(f: Format, rows: int, columns: int) -> tuple[int, ...]:
    """A shape that the format can have, from small numbers."""
    columns = columns * 32 if f.block[1] == 32 else columns
    stored = (2, rows, columns) if f.each or f.grouped or f.stack else (rows, columns)
    return f.as_stored(stored)


def exactly(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))
