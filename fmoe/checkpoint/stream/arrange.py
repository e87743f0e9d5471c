"""Boxes in memory: which ranges of a file they cover, how to read one with few calls, and moving it to its place."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from fmoe.checkpoint.stream.boxes import RUN, Box, Place, extent

_WORDS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
Array = np.ndarray[Any, Any]
_BLOCK = 32  # how many rows of a transposed matrix are copied at a time: their lines then stay in the cache


def ranges(boxes: Sequence[Box], span: Callable[[Box], tuple[Place, int, int]]) -> Iterator[tuple[int, int, list[Box]]]:
    """(low, high, boxes): the ranges of a file that the spans of boxes cover, those that overlap as one."""
    inside: list[Box] = []
    place, low, high = None, 0, 0
    for b in sorted(boxes, key=span):
        where, start, stop = span(b)
        if inside and (where != place or start >= high):
            yield low, high, inside
            inside = []
        low, high = (min(low, start), max(high, stop)) if inside else (start, stop)
        place = where
        inside.append(b)
    if inside:
        yield low, high, inside


def frame(
    shape: tuple[int, ...], strides: tuple[int, ...], item: int, *, whole: bool = False
) -> tuple[list[int], int, tuple[int, ...]]:
    """(where runs begin, their length, the strides of the box with its runs side by side).

    whole: runs without holes; else small holes are part of a run.
    """
    order = sorted(range(len(shape)), key=lambda k: -strides[k])
    for cut in range(len(order) + 1):
        inner = order[cut:]
        sizes, steps = [shape[k] for k in inner], [strides[k] for k in inner]
        length, full = extent(sizes, steps, item), prod(sizes) * item
        if full == length or not whole and (full > 0.98 * length or length <= RUN):
            break
    outer = order[:cut]
    runs = [
        sum(i * strides[k] for i, k in zip(at, outer, strict=True)) for at in product(*(range(shape[k]) for k in outer))
    ]
    packed, step = dict(zip(inner, steps, strict=True)), length
    for k in reversed(outer):
        packed[k] = step
        step *= shape[k]
    return runs, length, tuple(packed[k] for k in range(len(shape)))


def move(b: Box, source: Tensor, to: Tensor) -> None:
    """to[...] = source[...], in words of the box's item, a transposed one a few rows at a time.

    NumPy does it: on the thread that asks, without the interpreter's lock, where torch would start threads of its own.
    """
    word = _WORDS[b.item]
    there: Array = np.ndarray(b.shape, word, to.numpy().data, b.to_at, b.to_strides)
    here: Array = np.ndarray(b.shape, word, source.numpy().data, b.at, b.strides)
    if len(b.shape) < 2 or b.strides[-1] == min(b.strides):
        there[...] = here
        return
    for i in range(0, b.shape[-1], _BLOCK):
        there[..., i : i + _BLOCK] = here[..., i : i + _BLOCK]
