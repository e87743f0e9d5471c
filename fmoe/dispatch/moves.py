"""Rows of tokens and back, each in one pass over memory: two linear maps, each the other's transpose.

    spread(x)[n] = x[slots[n] // k]                      [T, D] -> [N, D]
    gather(rows)[t] = the sum of rows[n] with slots[n] // k == t, k ascending, in fp32 (fp64 stays)

Where every slot has a row, on the host. They differentiate in every way; a compiler never sees them.
"""

from typing import Any

import torch
from fmoe_kernels.host.batch import one_by_one
from fmoe_kernels.host.function import Function
from torch import Tensor
from torch.nn import functional as F

from fmoe.dispatch.watched import unwatched

PART = 1 << 17  # numbers that stay in the cache next to a core between two steps
IN_ORDER, VECTORS = 16, 32  # terms that torch.sum adds one after the other on a CPU, and columns in whole vectors


def spread(x: Tensor, slots: Tensor, k: int) -> Tensor:
    """x[slots[n] // k] for each row n; slots [N] int64 is a permutation of the T k slots.

    >>> spread(torch.tensor([[1.0], [2.0]]), torch.tensor([2, 0, 1, 3]), 2).flatten().tolist()
    [2.0, 1.0, 1.0, 2.0]
    """
    return _spread(x, slots, k) if unwatched(x) else _Spread.apply(x, slots, k)


def gather(rows: Tensor, slots: Tensor, k: int) -> Tensor:
    """The sum of the k rows of each token, in fp32 or fp64.

    >>> gather(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([2, 0, 1, 3]), 2).flatten().tolist()
    [5.0, 5.0]
    """
    return _gather(rows, slots, k) if unwatched(rows) else _Gather.apply(rows, slots, k)


def _spread(x: Tensor, slots: Tensor, k: int) -> Tensor:
    return x.index_select(0, slots // k)


def _gather(rows: Tensor, slots: Tensor, k: int) -> Tensor:
    row = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    return added(rows, row, k)


def added(rows: Tensor, row: Tensor, k: int, dtype: torch.dtype | None = None) -> Tensor:
    """out[t] = rows[row[t k]] + rows[row[t k + 1]] + .. in fp32 (fp64 stays), on a CPU in one pass over the rows.

    dtype: what sums are rounded to.

    >>> added(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.tensor([2, 0, 1, 3]), 2).flatten().tolist()
    [5.0, 10.0]
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    dtype = dtype or wide
    if k == 1:
        return rows.index_select(0, row).to(dtype)
    if k == 2 and rows.dtype.itemsize == 2:  # a sum of two is rounded once in any case
        a, b = (rows.index_select(0, of) for of in row.view(-1, 2).unbind(1))
        return a + b if dtype == rows.dtype else (a.to(wide) + b.to(wide)).to(dtype)
    if rows.is_cpu and rows.dtype == torch.float32 and rows.numel() >= PART // 2:
        return F.embedding_bag(row.view(-1, k), rows, mode="sum").to(dtype)
    part = len(row) if rows.device.type != "cpu" else max(1, PART // (k * rows.shape[1])) * k
    if part >= len(row):
        return summed(rows.index_select(0, row).unflatten(0, (-1, k)), wide).to(dtype)
    out = rows.new_empty(len(row) // k, rows.shape[1], dtype=dtype)
    for some, place in zip(row.split(part), out.split(part // k), strict=True):
        place.copy_(summed(rows.index_select(0, some).unflatten(0, (-1, k)), wide))
    return out


def summed(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """terms[.., 0, :] + terms[.., 1, :] + .. in a dtype, [.., K, D] -> [.., D]: on a CPU one after the other.

    torch.sum adds what is left of whole vectors, and of many terms, in parts: a token alone, or beside others that take
    another way, would be rounded otherwise.

    >>> summed(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.float64).tolist()
    [15.0]
    """
    K, D = terms.shape[-2:]
    if K <= 3 or not terms.is_cpu or (K <= IN_ORDER and D % VECTORS == 0):
        return terms.sum(-2, dtype=dtype)
    out = terms.select(-2, 0).to(dtype)
    for k in range(1, K):
        out = out + terms.select(-2, k)
    return out


class _Linear(Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, slots, ctx.k = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(slots)
        ctx.save_for_forward(slots)


class _Spread(_Linear):
    @staticmethod
    def forward(x: Tensor, slots: Tensor, k: int) -> Tensor:
        return _spread(x, slots, k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return gather(dy, ctx.saved_tensors[0], ctx.k).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _Spread.apply(dx, ctx.saved_tensors[0], ctx.k)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Spread, info, in_dims, args)


class _Gather(_Linear):
    @staticmethod
    def forward(rows: Tensor, slots: Tensor, k: int) -> Tensor:
        return _gather(rows, slots, k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return spread(dy.to(ctx.dtype), ctx.saved_tensors[0], ctx.k), None, None

    @staticmethod
    def jvp(ctx: Any, drows: Tensor, *_: None) -> Tensor:
        return _Gather.apply(drows, ctx.saved_tensors[0], ctx.k)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Gather, info, in_dims, args)
