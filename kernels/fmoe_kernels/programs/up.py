"""The up projection: z = x[token] @ w[e] + bias[e] and a = act(z) * weight, the gather and the activation fused in.

Weights are seen as [E, G, D, W]: G = 2 halves of W = I columns for a gated activation whose gate and up columns are
[g, v]; G = 1 with W = U columns otherwise. Where gate and up columns alternate, a tile holds both and is split.
"""

import triton
import triton.language as tl
from torch import Tensor

from fmoe_kernels.host.launch import Act, Tiling, config, grid_of, row_descriptors, run, weight_descriptor
from fmoe_kernels.programs import specialised, specialised_up
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.scalars import GATED, INTERLEAVED, SCALARS, epilogue_type
from fmoe_kernels.programs.tiles import (
    columns_of,
    finish,
    load_gathered,
    load_weight,
    multiply,
    pick_rows,
    pick_tile,
    store_rows,
    zeros,
)


@triton.jit
def up_kernel(
    x, slots, tokens, weights, w, bias, z, a, tiles, n_tiles, offsets,
    stride_x, se, sg, sk, sn, be, bg, bn, stride_z, stride_a,
    D, I, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    SAVE: tl.constexpr, TMA: tl.constexpr, TMA_W: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    WIDTH: tl.constexpr = 2 * BN if INTERLEAVED else BN  # columns of one tile of z
    PART: tl.constexpr = WIDTH // PARTS
    WIDE: tl.constexpr = epilogue_type(x.dtype.element_ty)
    W = 2 * I if INTERLEAVED else I
    tl.assume(D > 0)
    n_columns = tl.cdiv(I, BN)
    n_row_tiles = tl.load(n_tiles)
    for i in tl.range(tl.program_id(0), n_row_tiles * n_columns, tl.num_programs(0), disable_licm=True):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = tl.load(offsets + e + 1)
        n = block * WIDTH
        rows, inside, slot, token = pick_rows(slots, tokens, row, end, BM)
        g = zeros(BM, WIDTH, SWAP)
        v = zeros(BM, WIDTH, SWAP)
        for k in tl.range(0, D, BK):
            x_tile = load_gathered(x, token, stride_x, k, D, EVEN_K, BK)
            w_tile = load_weight(w, e, 0, k, n, se, sg, sk, sn, D, W, TMA_W, K_MAJOR, EVEN, BK, WIDTH)
            g = multiply(x_tile, w_tile, g, SWAP)
            if HALVES:
                w_tile = load_weight(w, e, 1, k, n, se, sg, sk, sn, D, W, TMA_W, K_MAJOR, EVEN, BK, WIDTH)
                v = multiply(x_tile, w_tile, v, SWAP)
        gs = columns_of(finish(g, SWAP), BM, WIDTH, PARTS)
        vs = columns_of(finish(v, SWAP), BM, WIDTH, PARTS)
        for p in tl.static_range(PARTS):
            g_part, v_part, at = gs[p], vs[p], n + p * PART
            if BIAS:
                columns = at + tl.arange(0, PART)
                start = bias + e.to(tl.int64) * be + columns * bn
                g_part += tl.load(start, mask=columns < W, other=0.0).to(tl.float32)[None, :]
                if HALVES:
                    v_part += tl.load(start + bg, mask=columns < W, other=0.0).to(tl.float32)[None, :]
            if SAVE:
                store_rows(z, g_part, row, end, 0, at, W, stride_z, TMA, BM, PART)
                if HALVES:
                    store_rows(z, v_part, row, end, 1, at, W, stride_z, TMA, BM, PART)
            if INTERLEAVED:
                g_part, v_part = g_part.reshape(BM, BN // PARTS, 2).split()
            y, _, _ = ACT(g_part.to(WIDE), v_part.to(WIDE), alpha, limit)
            if WEIGHTED:
                y *= tl.load(weights + slot, mask=inside, other=0.0)[:, None]
            store_rows(a, y, row, end, 0, block * BN + p * (BN // PARTS), I, stride_a, TMA, BM, BN // PARTS)


def up(
    x: Tensor, w: Tensor, bias: Tensor | None, weights: Tensor | None, r: Route, act: Act, tiling: Tiling, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(a [N', I], z [N', U] or None): the gathered up projection and its activation, weighted if weights is given."""
    E, D, U = w.shape
    gated, interleaved = GATED[act.name], INTERLEAVED[act.name]
    I = U // 2 if gated else U
    a = x.new_empty(len(r.slots), I)
    z = x.new_empty(len(r.slots), U) if save else None
    c = config("up", x, len(r.slots), r.n_experts, D, tiling, (x, w, a))
    w4 = halves(w, gated and not interleaved)
    b3 = halves(bias[:, None], gated and not interleaved)[:, :, 0] if bias is not None else None
    parts = min(2 * c.parts, 4) if interleaved else c.parts  # of as many columns of z, in whatever order
    cut = c.columns // parts
    width = 2 * c.columns if interleaved else c.columns
    z3 = z.view(len(a), -1, w4.shape[3]) if z is not None else None
    w_arg, tma_w, k_major = weight_descriptor(w4, c, c.depth, width)
    stored = {"a": (a[:, None], c.rows, cut)} | ({"z": (z3, c.rows, width // parts)} if z3 is not None else {})
    out, tma = row_descriptors(stored, c)
    tiles, n_tiles = r.tiles(c.rows)
    grid = grid_of(x, c, len(tiles) * triton.cdiv(I, c.columns))
    if specialised.takes("up", c, x) and tma and tma_w and bias is None and w4.shape[1] == 2 and D % c.depth == 0:
        specialised_up.up(
            x, w_arg, out.get("z", out["a"]), out["a"], weights, tiles, n_tiles, r, act, k_major, save, grid, c
        )
        return a, z
    run(
        up_kernel, grid, x, r.slots, r.tokens, weights, w_arg, b3, out.get("z", out["a"]), out["a"], tiles, n_tiles,
        r.offsets, x.stride(0), *w4.stride(), *(b3.stride() if b3 is not None else (0, 0, 0)), U, I, D, I, *act[1:],
        ACT=SCALARS[act.name], GATED=gated, INTERLEAVED=interleaved, BIAS=bias is not None,
        WEIGHTED=weights is not None, SAVE=save, TMA=tma, TMA_W=tma_w, K_MAJOR=k_major, EVEN_K=D % c.depth == 0,
        EVEN=D % c.depth == 0 and w4.shape[3] % width == 0, SWAP=c.swap,
        BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=parts, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return a, z


def halves(w: Tensor, split: bool) -> Tensor:
    """[E, D, U] as [E, G, D, U / G], a view: G = 2 where columns are [gate, up], else 1."""
    return w.unflatten(2, (2 if split else 1, -1)).transpose(1, 2)
