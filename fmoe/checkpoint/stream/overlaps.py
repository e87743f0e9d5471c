"""Tensors that are to be filled and share memory: what is written into one would be lost in another.

Only the two names of a tied weight may be one tensor, and then get what both are in the checkpoint.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmoe.sharding import is_dtensor
from fmoe.types import Problem, bits

MOST = 100_000  # steps of NumPy's search for an address in two tensors; beyond it they count as apart


class _Addresses:
    """The addresses of a tensor's elements, as NumPy counts them; no byte is looked at."""

    def __init__(self, tensor: Tensor):
        size = tensor.element_size()
        strides = tuple(size * n for n in tensor.stride())
        self.__array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": strides,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "version": 3,
        }


def overlapping(tensors: Mapping[str, Any], value: Callable[[str], Tensor] | None = None) -> Iterator[Problem]:
    """A problem for each tensor with elements in one place, and for each that shares memory with one before it.

    Views that lie between each other's rows share none. value: what a name will be filled with, for two names of one
    tensor: where it is the same there is no problem.

    >>> whole = torch.zeros(2, 4)
    >>> [*overlapping({"a": whole[:, :2], "b": whole[:, 2:]})], [p[0] for p in overlapping({"a": whole, "b": whole[1]})]
    ([], ["'a' and 'b' share memory, expected storage of its own for each: clone one"])
    """
    spans = list[tuple[torch.device, int, int, str, Tensor]]()
    for name, given in tensors.items():
        tensor = given.to_local() if is_dtensor(given) else given
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel() or not _at(tensor):
            continue
        if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            yield Problem(f"{name!r} is expanded, one element in many places, expected storage: clone it", (name,))
            continue
        steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.device, _at(tensor), _at(tensor) + (steps + 1) * tensor.element_size(), name, tensor))
    spans.sort(key=lambda span: (str(span[0]), span[1]))
    for k, (device, _, end, name, tensor) in enumerate(spans):
        for other, start, _, twin, of in spans[k + 1 :]:
            if other != device or start >= end:
                break
            if not _shared(tensor, of):
                continue
            tied = value is not None and _place(tensors[name]) == _place(tensors[twin])
            if tied and value is not None and torch.equal(bits(value(name)), bits(value(twin))):
                continue
            why = ": in the checkpoint they are not the same" * tied
            text = f"{name!r} and {twin!r} share memory, expected storage of its own for each: clone one"
            yield Problem(f"{text}{why}", (name, twin))
            break


def without_twins(tensors: Mapping[str, Any], held: Collection[str]) -> dict[str, Any]:
    """The tensors, less those that a checkpoint does not hold and that are, under another name, one that it holds: as
    a tied model has them, of which files have one.

    >>> one = torch.zeros(3)
    >>> sorted(without_twins({"embed": one, "head": one.view(3), "other": torch.zeros(3)}, ["embed"]))
    ['embed', 'other']
    """
    filled = {_place(t) for n, t in tensors.items() if n in held}
    return {n: t for n, t in tensors.items() if n in held or _place(t) is None or _place(t) not in filled}


def _place(given: Any) -> tuple[Any, ...] | None:
    """What two names of one tensor have in common; None of what has no memory."""
    tensor = given.to_local() if is_dtensor(given) else given
    if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel() or not _at(tensor):
        return None
    whole = (tuple(given.shape), given.placements) if is_dtensor(given) else ()
    return (tensor.device, _at(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, *whole)


def _at(tensor: Tensor) -> int:
    """Its address; 0 where it has none."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # of a kind without storage
        return 0


def _shared(one: Tensor, other: Tensor) -> bool:
    try:
        here, there = np.asarray(_Addresses(one)), np.asarray(_Addresses(other))
        return np.shares_memory(here, there, max_work=MOST)  # type: ignore[arg-type]  # NumPy's stubs know two values
    except np.exceptions.TooHardError:
        return False
