"""The backward of down projection and activation: from dy and z to dz, the weighted activation and weight gradients.

    g = dy[token] @ w[e]^T        dz = weight * g * act'(z)        a = weight * act(z)        dweight = sum_i g * act(z)

The sum over i leaves as one fp32 partial for each tile of columns, so that nothing is added in two orders.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmoe_kernels.host.launch import Act, Tiling, config, grid_of, row_descriptors, run, weight_descriptor
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.scalars import BACKWARD, GATED, INTERLEAVED, SCALARS, epilogue_type
from fmoe_kernels.programs.tiles import (
    columns_of,
    finish,
    load_gathered,
    load_halves,
    load_ragged,
    load_weight,
    map_element,
    multiply,
    pick_rows,
    pick_tile,
    prefetch_halves,
    store_rows,
    zeros,
)


@triton.jit
def dact_kernel(
    dy, slots, tokens, weights, w, z, z_memory, dz, a, partial, tiles, n_tiles, offsets,
    stride_dy, se, sg, sk, sn, stride_z, stride_a, stride_partial,
    D, I, alpha, limit,
    ACT: tl.constexpr, ELEMENT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    TMA: tl.constexpr, TMA_W: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, EVEN: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = GATED and not INTERLEAVED
    SUB: tl.constexpr = BN // PARTS
    WIDTH: tl.constexpr = 2 * SUB if INTERLEAVED else SUB
    WIDE: tl.constexpr = epilogue_type(dy.dtype.element_ty)
    W = 2 * I if INTERLEAVED else I
    tl.assume(D > 0)
    n_columns = tl.cdiv(I, BN)
    n_row_tiles = tl.load(n_tiles)
    for i in tl.range(tl.program_id(0), n_row_tiles * n_columns, tl.num_programs(0), disable_licm=True):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = tl.load(offsets + e + 1)
        rows, inside, slot, token = pick_rows(slots, tokens, row, end, BM)
        if TMA and ELEMENT is not None:  # z waits in L2 when the sum is done
            prefetch_halves(z_memory, row, end, block * BN * (W // I), W, stride_z, BM, BN * (WIDTH // SUB), 1 + HALVES)
        acc = zeros(BM, BN, SWAP)
        for k in tl.range(0, D, BK):
            dy_tile = load_gathered(dy, token, stride_dy, k, D, EVEN_K, BK)
            w_tile = load_weight(w, e, 0, k, block * BN, se, sg, sk, sn, D, I, TMA_W, K_MAJOR, EVEN, BK, BN)
            acc = multiply(dy_tile, w_tile, acc, SWAP)
        slot = tl.load(slots + rows, mask=inside, other=0)
        weight = tl.load(weights + slot, mask=inside, other=0.0)[:, None]
        total = tl.zeros([BM], WIDE)
        parts = columns_of(finish(acc, SWAP), BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            n = block * BN + p * SUB
            at = 2 * n if INTERLEAVED else n
            if HALVES:
                g, v = load_halves(z, row, end, at, W, stride_z, TMA, BM, SUB)
            else:
                g = load_ragged(z, row, end, 0, at, W, stride_z, TMA, BM, WIDTH)
                v = g
                if INTERLEAVED:
                    g, v = g.reshape(BM, SUB, 2).split()
            g, v = g.to(WIDE), v.to(WIDE)
            if ELEMENT is None:  # the interpreter, which maps nothing
                y, dg, dv = ACT(g, v, alpha, limit)
                by_z = parts[p] * weight
                y, q, dg, dv = y * weight, parts[p] * y, by_z * dg, by_z * dv
            else:
                y, q, dg, dv = map_element(ELEMENT, parts[p].to(WIDE), g, v, weight.to(WIDE), alpha, limit)
            store_rows(a, y, row, end, 0, n, I, stride_a, TMA, BM, SUB)
            if INTERLEAVED:
                store_rows(dz, tl.join(dg, dv).reshape(BM, WIDTH), row, end, 0, at, W, stride_z, TMA, BM, WIDTH)
            else:
                store_rows(dz, dg, row, end, 0, at, W, stride_z, TMA, BM, WIDTH)
                if GATED:
                    store_rows(dz, dv, row, end, 1, at, W, stride_z, TMA, BM, WIDTH)
            # act(0) is 0, but z past the last column is not
            column = n + tl.arange(0, SUB)
            if not EVEN:
                q = tl.where((column < I)[None, :], q, 0.0)
            total += tl.sum(q, 1)
        tl.store(partial + rows.to(tl.int64) * stride_partial + block, total.to(tl.float32), mask=inside)


def dact(
    dy: Tensor, w: Tensor, z: Tensor, weights: Tensor, r: Route, act: Act, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz [N', U], weight * act(z) [N', I], partials [N', n] fp32 whose row sums are the gradients of the weights)."""
    E, I, D = w.shape
    U = z.shape[1]
    gated, interleaved, element = GATED[act.name], INTERLEAVED[act.name], BACKWARD[act.name]
    G = 2 if gated and not interleaved else 1
    dz, a = torch.empty_like(z), z.new_empty(len(z), I)
    c = config("dact", dy, len(r.slots), r.n_experts, D, tiling, (dy, w, z, a))
    partial = z.new_empty(len(z), triton.cdiv(I, c.columns), dtype=torch.float32)
    w4 = w.mT[:, None]
    w_arg, tma_w, k_major = weight_descriptor(w4, c, c.depth, c.columns)
    # what other activations hold of an element takes registers: their parts are half as wide, down to 16 columns
    parts = c.parts if act.name in ("swiglu", "relu2") else max(c.parts, min(2 * c.parts, c.columns // 16))
    cut = c.columns // parts
    width = 2 * cut if interleaved else cut
    z3, dz3 = (t.view(len(t), G, -1) for t in (z, dz))
    rows, tma = row_descriptors(
        {"z": (z3, c.rows, width, G), "dz": (dz3, c.rows, width), "a": (a[:, None], c.rows, cut)}, c
    )
    tiles, n_tiles = r.tiles(c.rows)
    grid = grid_of(dy, c, len(tiles) * triton.cdiv(I, c.columns))
    run(
        dact_kernel, grid, dy, r.slots, r.tokens, weights, w_arg, rows["z"], z, rows["dz"], rows["a"], partial, tiles,
        n_tiles, r.offsets, dy.stride(0), *w4.stride(), U, I, partial.stride(0), D, I, *act[1:],
        ACT=SCALARS[act.name], ELEMENT=element if isinstance(element, triton.JITFunction) else None,
        GATED=gated, INTERLEAVED=interleaved, TMA=tma, TMA_W=tma_w, K_MAJOR=k_major,
        EVEN_K=D % c.depth == 0, EVEN=D % c.depth == 0 and I % c.columns == 0, SWAP=c.swap,
        BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=parts, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return dz, a, partial
