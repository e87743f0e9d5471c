"""Parameters of many small modules as one stacked tensor, without a copy for each call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gather(parameters: Sequence[Tensor]) -> None:
    """Moves parameters of one shape into one piece of memory, side by side: values and identities stay."""
    if stride_of(parameters) is None:
        whole = torch.stack([p.detach() for p in parameters])
        for p, part in zip(parameters, whole.unbind(0), strict=True):
            p.data = part


def stride_of(parameters: Sequence[Tensor]) -> int | None:
    """How many elements apart parameters of one shape lie in one piece of memory; None: they do not."""
    first = parameters[0]
    alike = (first.shape, first.stride(), first.dtype, first.untyped_storage().data_ptr())
    if any((p.shape, p.stride(), p.dtype, p.untyped_storage().data_ptr()) != alike for p in parameters):
        return None
    steps = {int(b.storage_offset() - a.storage_offset()) for a, b in zip(parameters, parameters[1:], strict=False)}
    step = steps.pop() if len(steps) == 1 else 0 if steps else first.numel()
    return step if step > 0 else None


def stacked(parameters: Sequence[Tensor]) -> Tensor:
    """[E, ..] of E parameters: a view where `gather` has laid them side by side, otherwise a copy.

    >>> parts = [torch.nn.Parameter(torch.full((2,), float(e))) for e in range(3)]
    >>> gather(parts)
    >>> stacked(parts).tolist(), stacked(parts).data_ptr() == parts[0].data_ptr()
    ([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], True)
    """
    step = stride_of(parameters)
    return torch.stack(tuple(parameters)) if step is None else _Side.apply(step, *parameters)


class _Side(torch.autograd.Function):
    @staticmethod
    def forward(step: int, *parameters: Tensor) -> Tensor:
        first = parameters[0].detach()
        return first.as_strided((len(parameters), *first.shape), (step, *first.stride()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.unbind(0)
