"""Which boxes of a whole tensor a rank holds, and what went wrong on any of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from fmoe.checkpoint.staging.failed import Failed
from fmoe.layout.sharded.placements import indices_of
from fmoe.sharding import is_dtensor
from fmoe.types import AdapterError, Problem

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Piece(NamedTuple):
    """part is the whole tensor's box [offsets, offsets + its shape), and shares its storage; at: where part begins."""

    offsets: tuple[int, ...]
    at: tuple[int, ...]
    part: Tensor


def pieces(tensor: Any) -> Iterator[Piece]:
    """This rank's part of a DTensor, or all of a plain tensor, as boxes of the whole."""
    if not is_dtensor(tensor):
        yield Piece((0,) * tensor.ndim, (0,) * tensor.ndim, tensor)
        return
    local = tensor.to_local()
    for box in product(*map(_runs, indices_of(tensor))):
        part = local
        for dim, (_, at, n) in enumerate(box):
            part = part.narrow(dim, at, n)
        yield Piece(tuple(start for start, _, _ in box), tuple(at for _, at, _ in box), part)


def _runs(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first index, its place among them, length) of every run of consecutive indices."""
    if isinstance(indices, range):
        return [(indices.start, 0, len(indices))] if indices else []
    starts = [i for i, x in enumerate(indices) if not i or x != indices[i - 1] + 1]
    return [(indices[a], a, b - a) for a, b in zip(starts, [*starts[1:], len(indices)], strict=True)]


def first_of_copies(tensor: Any) -> bool:
    """Whether no rank before this one on the DTensor's mesh holds the same part of it."""
    here = tensor.device_mesh.get_coordinate()
    return not any(i for i, p in zip(here, tensor.placements, strict=True) if p.is_replicate())


def run_starts(whole: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> tuple[list[int], int]:
    """Where a box lies in a contiguous tensor: the first element of each run, and how long all runs are.

    >>> run_starts((3, 4), (1, 2), (2, 2)), run_starts((3, 4), (1, 0), (2, 4))
    (([6, 10], 2), ([4], 8))
    """
    outer = max((d + 1 for d, n in enumerate(shape) if n < whole[d]), default=1) - 1
    stride = [prod(whole[d + 1 :]) for d in range(len(whole))]
    first = sum(o * s for o, s in zip(offsets, stride, strict=True))
    grid = product(*(range(n) for n in shape[:outer]))
    return [first + sum(i * s for i, s in zip(at, stride, strict=False)) for at in grid], prod(shape[outer:])


@contextmanager
def surfacing() -> Iterator[None]:
    """What DCP gathers of all ranks and raises, which is no Exception, as one AdapterError with the keys of all.

    >>> with surfacing():
    ...     raise CheckpointException("load", {0: (AdapterError("'w' is missing"), None)})
    Traceback (most recent call last):
    fmoe.types.AdapterError: 'w' is missing
    """
    try:
        yield
    except CheckpointException as error:
        failures = {rank: _told(failure) for rank, (failure, _) in sorted(error.failures.items())}
        for failure in failures.values():
            if not isinstance(failure, Exception):  # an interruption stays one
                raise failure from error
            if isinstance(failure, Failed) and not dist.is_initialized():
                raise failure from error
        problems: list[Problem] = []
        for rank, failure in failures.items():
            system = isinstance(failure, OSError)  # which is of that rank, whatever it has become on the way
            kind = "OSError" if system else type(failure).__name__
            told = f"rank {rank}: {kind}: {failure}" if dist.is_initialized() else str(failure)
            problems += failure.found if isinstance(failure, AdapterError) and not system else [Problem(told)]
        raise AdapterError(problems) from error


def _told(failure: BaseException) -> BaseException:
    """What the system says of a file, with what to do."""
    if isinstance(failure, OSError) and failure.filename is not None and not isinstance(failure, Failed):
        return Failed.of(failure)
    return failure


@contextmanager
def alive(group: "ProcessGroup | None") -> Iterator[None]:
    """What torch.distributed finds out of a rank that ends without a word, as an AdapterError that names it."""
    try:
        yield
    except RuntimeError as error:
        of_a_group = isinstance(error, dist.DistError) or "gloo" in str(error)  # whose errors have no class
        if not of_a_group or not dist.is_initialized() or dist.get_world_size(group) < 2:
            raise
        others = [r for r in range(dist.get_world_size(group)) if r != dist.get_rank(group)]
        who = f"rank {others[0]}" if len(others) == 1 else f"one of the ranks {others}"
        why = str(error).partition("\n")[0].rpartition("] ")[2]
        raise AdapterError(f"{who} has ended, or is silent ({why}): run this again on all ranks") from error
