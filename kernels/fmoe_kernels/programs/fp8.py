"""FP8 products as DeepSeek-V3 trains: e4m3 rows scaled per 1x128, e4m3 weights scaled per 128x128, fp32 sums.

    quantize_rows   x -> (q, s): every 128 columns of a row share a scale
    gmm             out[n] = sum over 128-column groups c of s[n, c] * w_scale[e, c, .] * (q[n, c] @ w[e, c])

Each group is multiplied on its own and added up in fp32, so that the short sums of FP8 matrix units never run longer
than 128. The eager twins are `reference.quantize_rows` and `reference.gmm_fp8`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fmoe_kernels.host import configs
from fmoe_kernels.host.check import ENDS, FLOATS, check, few_enough
from fmoe_kernels.host.launch import (
    Tiling,
    check_runs,
    config,
    dense,
    grid_of,
    row_descriptors,
    run,
    weight_descriptor,
)
from fmoe_kernels.programs.route import Route, sorted_route
from fmoe_kernels.programs.tiles import (
    columns_of,
    finish,
    load_rows,
    load_weight,
    multiply,
    pick_tile,
    store_rows,
    zeros,
)

E4M3 = torch.float8_e4m3fn
BLOCK, GROUPS = 128, 16  # columns that share a scale; rows that one program quantises


@triton.jit
def nearest(r):
    """r, in fp32, to the nearest e4m3, ties to even; said here, so that every device and the interpreter agree."""
    bits = r.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    small = ((r * 512 + 12582912.0) - 12582912.0) / 512  # 1.5 * 2^23: what is added to it loses its fraction
    return tl.where(tl.abs(r) < 0.015625, small, normal)


@triton.jit(do_not_specialize=["N"])
def quantize_kernel(
    x, q, s, stride_x, stride_q, stride_s, N, K,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS groups of BLOCK columns, one below the other."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1)
    columns = c * BLOCK + tl.arange(0, BLOCK)
    mask = (n < N)[:, None] & (columns < K)[None, :]
    rows = tl.load(x + n[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    most = tl.max(tl.where(rows == rows, tl.abs(rows), 0.0), 1)
    scale = tl.where(most > 0, most / 448.0, 1.0)
    values = nearest(rows / scale[:, None]).to(q.dtype.element_ty)
    tl.store(q + n[:, None] * stride_q + columns[None, :], values, mask=mask)
    tl.store(s + n * stride_s + c, scale, mask=n < N)


@triton.jit
def gmm_fp8_kernel(
    a, a_scale, w, w_scale, out, tiles, n_tiles, offsets,
    stride_a, stride_s, se, sg, sk, sn, ce, ck, cn, stride_out, K, N,
    TMA: tl.constexpr, TMA_W: tl.constexpr, K_MAJOR: tl.constexpr, EVEN: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BK is 128, the width of a group, and BN divides 128: a tile of w has one scale."""
    n_columns = tl.cdiv(N, BN)
    n_row_tiles = tl.load(n_tiles)
    for i in tl.range(tl.program_id(0), n_row_tiles * n_columns, tl.num_programs(0)):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = tl.load(offsets + e + 1)
        n = block * BN
        rows = row + tl.arange(0, BM)
        scales = a_scale + rows.to(tl.int64) * stride_s
        block_scales = w_scale + e.to(tl.int64) * ce + n // BK * cn
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, K, BK):
            a_tile = load_rows(a, row, end, k, K, stride_a, TMA, BM, BK)
            w_tile = load_weight(w, e, 0, k, n, se, sg, sk, sn, K, N, TMA_W, K_MAJOR, EVEN, BK, BN)
            part = finish(multiply(a_tile, w_tile, zeros(BM, BN, SWAP), SWAP), SWAP)
            by_row = tl.load(scales + k // BK, mask=rows < end, other=0.0)
            acc += part * (by_row * tl.load(block_scales + k // BK * ck))[:, None]
        parts = columns_of(acc, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            store_rows(out, parts[p], row, end, 0, n + p * (BN // PARTS), N, stride_out, TMA, BM, BN // PARTS)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s) with q[n, k] * s[n, k // 128] = x[n, k] to e4m3: x [N, K] -> q [N, K] e4m3, s [N, ceil(K / 128)] fp32.

    s is the largest magnitude of its 128 values over 448, and 1 where they are all zero; NaN stays NaN and counts for
    no scale. Raises ValueError for x of another dtype or shape.
    """
    check("fp8.quantize_rows", {"x": (x, "N K", FLOATS)})
    check_runs(x=x)
    N, K = x.shape
    q, s = torch.empty(N, K, dtype=E4M3, device=x.device), x.new_empty(N, -(-K // BLOCK), dtype=torch.float32)
    if N and K:
        x = dense(x)
        grid = triton.cdiv(N, GROUPS), s.shape[1]
        strides = x.stride(0), q.stride(0), s.stride(0)
        run(quantize_kernel, grid, x, q, s, *strides, N, K, BLOCK=BLOCK, ROWS=GROUPS, num_warps=4)
    return q, s


def gmm(x: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ (w[e] * w_scale[e] by blocks), for the rows n of expert e, both sides in e4m3: [N, M] as x.

    x [N, K] fp16, bf16 or fp32, quantised here. w [E, K, M] e4m3 of any strides (K dense is fastest), w_scale
    [E, ceil(K / 128), ceil(M / 128)] fp32. offsets [E]: where the rows of each expert end; rows after the last end are
    unspecified, those that fall or lie outside [0, N] are brought there. Waits for nothing. Raises ValueError for
    tensors that do not fit, and where the device has no e4m3 matrix units.
    """
    given = {"x": (x, "N K", FLOATS), "w": (w, "E K M", (E4M3,)), "offsets": (offsets, "E", ENDS)}
    sizes = check("fp8.gmm", given)
    sizes |= {"k": -(-sizes["K"] // BLOCK), "m": -(-sizes["M"] // BLOCK)}
    check("fp8.gmm", {"x": given["x"], "w_scale": (w_scale, "E k m", (torch.float32,))}, **sizes)
    few_enough("fp8.gmm", "x", len(x))
    check_runs(x=x, w=w, w_scale=w_scale, offsets=offsets)
    if not served(arch := configs.architecture(x.device)):
        raise ValueError(f"fmoe_kernels.fp8: no tiles of e4m3 matrix units for {arch}, expected sm_90 or later")
    if 0 in sizes.values():
        return x.new_zeros(len(x), w.shape[2])
    return launch(*quantize_rows(x), w, w_scale.resolve_neg(), x.dtype, sorted_route(x, offsets), Tiling())


def served(arch: str) -> bool:
    """Whether the table has tiles for an architecture: those before Hopper have no e4m3, gfx942 another one.

    >>> served("sm_90"), served("sm_86"), served("gfx942")
    (True, False, False)
    """
    table = configs.load()
    return "gmm_fp8" in table[configs.nearest(arch, table)]


def launch(q: Tensor, s: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, r: Route, tiling: Tiling) -> Tensor:
    """out [N', M] = (q [N', K] * s) @ (w[e] [K, M] * w_scale[e])."""
    _, K, N = w.shape
    out = q.new_empty(len(q), N, dtype=dtype)
    c = config("gmm_fp8", q, len(r.slots), r.n_experts, K, tiling, ())
    w4 = w[:, None]
    w_arg, tma_w, k_major = weight_descriptor(w4, c, c.depth, c.columns)
    rows, tma = row_descriptors(
        {"out": (out[:, None], c.rows, c.columns // c.parts), "a": (q[:, None], c.rows, c.depth)}, c
    )
    a_arg = TensorDescriptor(q, q.shape, q.stride(), [c.rows, c.depth]) if tma else q
    tiles, n_tiles = r.tiles(c.rows)
    grid = grid_of(q, c, len(tiles) * triton.cdiv(N, c.columns))
    run(
        gmm_fp8_kernel, grid, a_arg, s, w_arg, w_scale, rows["out"], tiles, n_tiles, r.offsets,
        q.stride(0), s.stride(0), *w4.stride(), *w_scale.stride(), N, K, N,
        TMA=tma, TMA_W=tma_w, K_MAJOR=k_major, EVEN=K % c.depth == 0 and N % c.columns == 0, SWAP=c.swap,
        BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=c.parts, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
