"""The grouped matrix product: out[n] = a[n] @ w[e] + weight[n] * bias[e], e the expert of row n."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fmoe_kernels.host.launch import Tiling, config, grid_of, row_descriptors, run, weight_descriptor
from fmoe_kernels.programs import specialised
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.tiles import (
    columns_of,
    finish,
    load_rows,
    load_weight,
    multiply,
    pick_rows,
    pick_tile,
    store_rows,
    zeros,
)


@triton.jit
def gmm_kernel(
    a, w, bias, weights, slots, tokens, out, tiles, n_tiles, offsets,
    stride_a, se, sg, sk, sn, be, bn, stride_out, K, N,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    TMA: tl.constexpr, TMA_W: tl.constexpr, K_MAJOR: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    n_columns = tl.cdiv(N, BN)
    n_row_tiles = tl.load(n_tiles)
    first, last, step = tl.program_id(0), n_row_tiles * n_columns, tl.num_programs(0)
    for i in tl.range(first, last, step, flatten=FLATTEN, disable_licm=not FLATTEN):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = tl.load(offsets + e + 1)
        n = block * BN
        acc = zeros(BM, BN, SWAP)
        for k in tl.range(0, K, BK):
            a_tile = load_rows(a, row, end, k, K, stride_a, TMA, BM, BK)
            w_tile = load_weight(w, e, 0, k, n, se, sg, sk, sn, K, N, TMA_W, K_MAJOR, EVEN, BK, BN)
            acc = multiply(a_tile, w_tile, acc, SWAP)
        acc = finish(acc, SWAP)
        if BIAS:
            columns = n + tl.arange(0, BN)
            b = tl.load(bias + e.to(tl.int64) * be + columns * bn, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            if WEIGHTED:
                rows, inside, slot, token = pick_rows(slots, tokens, row, end, BM)
                b = b * tl.load(weights + slot, mask=inside, other=0.0)[:, None]
            acc += b
        parts = columns_of(acc, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            store_rows(out, parts[p], row, end, 0, n + p * (BN // PARTS), N, stride_out, TMA, BM, BN // PARTS)


def gmm(a: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor | None, r: Route, tiling: Tiling) -> Tensor:
    """out [N', N] = a [N', K] @ w[e] [K, N] + bias[e], the bias weighted if weights is given."""
    E, K, N = w.shape
    out = a.new_empty(len(a), N)
    c = config("gmm", a, len(r.slots), r.n_experts, K, tiling, (a, w, out))
    w4 = w[:, None]
    w_arg, tma_w, k_major = weight_descriptor(w4, c, c.depth, c.columns)
    # what is read must be aligned as what is written is
    rows, tma = row_descriptors(
        {"out": (out[:, None], c.rows, c.columns // c.parts), "a": (a[:, None], c.rows, c.depth)}, c
    )
    a_arg = TensorDescriptor(a, a.shape, a.stride(), [c.rows, c.depth]) if tma else a
    tiles, n_tiles = r.tiles(c.rows)
    grid = grid_of(a, c, len(tiles) * triton.cdiv(N, c.columns))
    if specialised.takes("gmm", c, a) and tma and tma_w and bias is None:
        specialised.gmm(a_arg, w_arg, rows["out"], tiles, n_tiles, r, k_major, grid, c)
        return out
    run(
        gmm_kernel, grid, a_arg, w_arg, bias, weights, r.slots, r.tokens, rows["out"], tiles, n_tiles, r.offsets,
        a.stride(0), *w4.stride(), *(bias.stride() if bias is not None else (0, 0)), N, K, N,
        BIAS=bias is not None, WEIGHTED=bias is not None and weights is not None, TMA=tma, TMA_W=tma_w,
        K_MAJOR=k_major, EVEN=K % c.depth == 0 and N % c.columns == 0, SWAP=c.swap,
        BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=c.parts, FLATTEN=c.flatten,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
