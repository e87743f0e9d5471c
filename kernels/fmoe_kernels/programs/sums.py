"""The sums over rows: combine, bias and routing-weight gradients. Each sum has one order; there are no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmoe_kernels.host.launch import run
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.tiles import pick_rows


@triton.jit
def combine_kernel(
    y, inverse, weights, out, stride_y, stride_out, D,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k weights[t, k] * y[inverse[t, k]] in fp32, k ascending; rows of dropped slots are not read."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse + t * TOP_K + k)
        mask = d < tl.where(row < 0, 0, D)
        part = tl.load(y + row.to(tl.int64) * stride_y + d, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + t * TOP_K + k)
            part = tl.where(mask, part * weight, 0.0)
        total += part
    tl.store(out + t * stride_out + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def bias_kernel(
    y, slots, tokens, weights, out, offsets, stride_y, stride_out, W,
    GATHER: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[e] = the sum of y[n] over the rows n of e, or of weight[n] * y[token of n], in fp64."""
    e = tl.program_id(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    start, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    total = tl.zeros([BC], tl.float64)
    for first in range(start, end, BR):
        if GATHER:
            _, inside, slot, row = pick_rows(slots, tokens, first, end, BR)
        else:
            row = (first + tl.arange(0, BR)).to(tl.int64)
            inside = row < end
        mask = inside[:, None] & (columns < W)[None, :]
        part = tl.load(y + row[:, None] * stride_y + columns[None, :], mask=mask, other=0.0).to(tl.float64)
        if GATHER:
            part *= tl.load(weights + slot, mask=inside, other=0.0).to(tl.float64)[:, None]
        total += tl.sum(part, 0)
    tl.store(out + e.to(tl.int64) * stride_out + columns, total.to(out.dtype.element_ty), mask=columns < W)


@triton.jit
def dweight_kernel(
    partial, dy, bias, slots, tokens, out, tiles, n_tiles, offsets, n_partial, stride_dy, be, bn, D,
    BIAS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[slot of n] = sum_j partial[n, j] (+ dy[token of n] . bias[e]), in fp64: the two may cancel."""
    i = tl.program_id(0)
    if i < tl.load(n_tiles):
        e, row = tl.load(tiles + 2 * i), tl.load(tiles + 2 * i + 1)
        rows, inside, slot, token = pick_rows(slots, tokens, row, tl.load(offsets + e + 1), BM)
        total = tl.zeros([BM], tl.float64)
        for j in range(0, n_partial):
            total += tl.load(partial + rows.to(tl.int64) * n_partial + j, mask=inside, other=0.0).to(tl.float64)
        if BIAS:
            for first in range(0, D, BLOCK):
                d = first + tl.arange(0, BLOCK)
                b = tl.load(bias + e.to(tl.int64) * be + d * bn, mask=d < D, other=0.0).to(tl.float64)
                mask = inside[:, None] & (d < D)[None, :]
                part = tl.load(dy + token[:, None] * stride_dy + d[None, :], mask=mask, other=0.0).to(tl.float64)
                total += tl.sum(part * b[None, :], 1)
        tl.store(out + slot, total.to(tl.float32), mask=inside)


def combine(y: Tensor, weights: Tensor | None, r: Route, n_tokens: int, dtype: torch.dtype) -> Tensor:
    """out [T, D]: the sum of each token's rows in fp32, weighted if weights [T K] is given."""
    D = y.shape[1]
    out = y.new_empty(n_tokens, D, dtype=dtype)
    block = min(triton.next_power_of_2(D), 1024)
    run(
        combine_kernel, (n_tokens, triton.cdiv(D, block)), y, r.inverse, weights, out, y.stride(0), out.stride(0), D,
        TOP_K=r.top_k, WEIGHTED=weights is not None, BLOCK=block,
    )  # fmt: skip
    return out


def bias_gradient(y: Tensor, weights: Tensor | None, r: Route, dtype: torch.dtype) -> Tensor:
    """out [E, W]: the sum of y's rows of each expert in fp64; with weights, of weight * y[token of the row]."""
    W = y.shape[1]
    out = y.new_empty(r.n_experts, W, dtype=dtype)
    run(
        bias_kernel, (r.n_experts, triton.cdiv(W, 64)), y, r.slots, r.tokens, weights, out, r.offsets,
        y.stride(0), out.stride(0), W, GATHER=weights is not None, BR=32, BC=64,
    )  # fmt: skip
    return out


def dweight(partial: Tensor, dy: Tensor, bias: Tensor | None, r: Route) -> Tensor:
    """out [T K] fp32: the gradient of the routing weights, zero where a slot was dropped."""
    out = torch.zeros_like(r.inverse, dtype=torch.float32)
    tiles, n_tiles = r.tiles(16)
    run(
        dweight_kernel, (len(tiles),), partial, dy, bias, r.slots, r.tokens, out, tiles, n_tiles, r.offsets,
        partial.shape[1], dy.stride(0), *(bias.stride() if bias is not None else (0, 0)), dy.shape[1],
        BIAS=bias is not None, BM=16, BLOCK=128,
    )  # fmt: skip
    return out
