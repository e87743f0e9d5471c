"""One rank's place in a process group, and the three collectives that dispatchers are made of.

A `Context` is made by the caller before anything runs and closed by him. Every rank of the group makes the same calls
in the same order; whatever fails names the dispatcher, the step and the rank, and nothing works after it: a group in
which one collective has failed may hand that failure to the next.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmoe.dispatch.moves import summed


class Context:
    """(group, rank, size) and the name of the dispatcher that they serve."""

    def __init__(self, name: str, group: "dist.ProcessGroup | None") -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{name}: no process group, expected torch.distributed.init_process_group() before")
        self.name, self.group, self.rank, self.size = name, group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"{name}: this process is not in the group, expected one of its ranks to ask")
        self._unusable = ""

    def close(self) -> None:
        """No use after this; the group stays as it is, its maker's to destroy."""
        self._unusable = self._unusable or "it is closed: make another, or close it later"

    def check(self, step: str) -> None:
        """Raises RuntimeError once closed, or after a failure."""
        if self._unusable:
            raise RuntimeError(f"{self.name}: {step}: {self._unusable}")

    def all_to_all(self, step: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """sent[r] of the rows, in turn, to each rank r; back come received[r] rows of each rank r, in turn."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        self._run(step, dist.all_to_all_single, out, rows.contiguous(), list(received), list(sent))
        return out

    def all_gather(self, step: str, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows of all ranks, in turn: lengths[r] of rank r.

        Padded to the longest on the way: gloo refuses lists of unequal tensors, and other verbs are younger than 2.11.
        """
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        self._run(step, dist.all_gather, parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    def reduce_scatter(self, step: str, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """The sum over ranks, ascending, of the part of rows that is this rank's: the transpose of `all_gather`.

        Each rank adds up its own part. dist.reduce_scatter would leave the order of the sum to a library; gloo's moves
        as many bytes as an all_reduce (measured), and NCCL makes unequal lengths one reduction for each rank.
        """
        mine = lengths[self.rank]
        parts = self.all_to_all(step, rows, lengths, [mine] * self.size)
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = summed(parts.unflatten(0, (self.size, mine)).flatten(1), wide)
        return total.to(rows.dtype).view(mine, *rows.shape[1:])

    def _run(self, step: str, verb: Callable[..., Any], *args: Any) -> None:
        self.check(step)
        try:
            verb(*args, group=self.group)
        except Exception as error:
            self._unusable = f"an earlier collective failed on rank {self.rank}: make a new group"
            raise RuntimeError(
                f"{self.name}: {step}: failed on rank {self.rank} of {self.size}: {error}\n"
                "Another rank died, stalled or raised before this step: the first error of any rank is the cause."
            ) from error
