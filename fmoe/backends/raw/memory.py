"""Memory by the page: what is not written costs nothing, and what is costs a third of what malloc's small pages do."""

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

LARGE = 1 << 22  # bytes of zeros that are written in part; less is had faster from malloc
KEPT = 1 << 25  # bytes, from which on malloc takes memory from the system each time anew, in small pages


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of a shape, with the dtype and device of `like`; on a CPU, large ones are pages that the system fills when
    they are first written: a gradient of many experts costs what its used experts cost.

    >>> zeros((2, 1), torch.ones(1)).tolist()
    [[0.0], [0.0]]
    """
    return like.new_zeros(*shape) if _small(shape, like, LARGE) else _pages(shape, like)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory of a shape, with the dtype and device of `like`, that nobody has written."""
    return like.new_empty(*shape) if _small(shape, like, KEPT) else _pages(shape, like)


def partly(shape: Sequence[int], like: Tensor, used: Sequence[object]) -> Tensor:
    """[E, ..] that is 0 where not used[e], and elsewhere whatever it is: the caller writes all of that.

    Memory that malloc has at hand is zeroed in a third of the time that the system takes to give as much anew.

    >>> partly((2, 1), torch.ones(1), [0, 5])[0].tolist()
    [0.0]
    """
    idle = [e for e, n in enumerate(used) if not n]
    if like.device.type != "cpu" or 4 * len(idle) >= 3 * len(used) or not _small(shape, like, KEPT):
        return zeros(shape, like)
    out = like.new_empty(*shape)
    for e in idle:
        out[e].zero_()
    return out


def _small(shape: Sequence[int], like: Tensor, than: int) -> bool:
    return like.device.type != "cpu" or prod(shape) * like.itemsize < than or not hasattr(mmap, "MADV_HUGEPAGE")


def _pages(shape: Sequence[int], like: Tensor) -> Tensor:
    pages = mmap.mmap(-1, prod(shape) * like.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(*shape)
