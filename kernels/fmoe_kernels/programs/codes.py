"""The grouped product with matrices that are codes: out[n] = a[n] @ w[e], each tile of w decoded as it is loaded.

    w[k, n] = value(code[k, n]) * scale[k // SK, n // SN]          (NVFP4: * second[n], or / second[n])
    w[k, n] = (code[k, n] - second[k // SK, n // SN]) * scale[..]   (zero points)

Codes are e4m3 or int8, or several to a word along one axis, from the low end: e2m1 (two a byte), int4 and int8 (eight
and four in 32 bits). They become numbers by integer arithmetic, the same on every device and in the interpreter, in
fp32, and are rounded to a's dtype once, as decoding before would. The host looks at nothing: a NaN among scales is NaN
in the result.
The eager twin is `reference.decode`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fmoe_kernels.host.codes import PACKED
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Tiling, config, grid_of, row_descriptors, run
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.tiles import columns_of, finish, load_rows, multiply, pick_tile, store_rows, zeros

WHOLE = 2**30


class Coded(NamedTuple):
    """Matrices w [E, K, N] as codes.

    words [E, K / packed, N], uint8 or int32; scale [E, K / block[0], N / block[1]] (powers of two, or 0 for all), uint8
    where it is 2^(s - 127), or a float; second [E, 1, N] or None, or, uint8 and of scale's shape, zero points, which
    count from the least code. code: e4m3, e2m1, int4, int8 (from -128 on), or signed: bytes in two's complement. late:
    second, one number for each matrix, multiplies last. turned: what is multiplied is w[e]^T.
    """

    words: Tensor
    scale: Tensor
    second: Tensor | None
    code: str
    block: tuple[int, int]
    divides: bool = False
    late: bool = False
    turned: bool = False

    @property
    def packed(self) -> int:
        return PACKED[self.code]

    @property
    def how(self) -> int:
        """What second is: 0 nothing, 1 multiplies, 2 divides, 3 multiplies last, 4 zero points."""
        if self.second is None or self.second.dtype == torch.uint8:
            return 0 if self.second is None else 4
        return 3 if self.late else 2 if self.divides else 1


@triton.jit
def from_e4m3(byte):
    m = byte & 127
    normal = ((m << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(m < 8, m.to(tl.float32) * 0.001953125, normal)
    value = tl.where(m == 127, float("nan"), value)
    return tl.where(byte >= 128, -value, value)


@triton.jit
def from_e2m1(nibble):
    m = nibble & 7
    normal = ((m << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(m < 2, m.to(tl.float32) * 0.5, normal)
    return tl.where(nibble >= 8, -value, value)


@triton.jit
def from_e8m0(byte):
    bits = tl.where(byte == 0, 1 << 22, byte << 23)
    return tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def spread(x, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [R, C], every number a block of [ROWS, COLUMNS]."""
    return tl.reshape(tl.broadcast_to(x[:, None, :, None], [R, ROWS // R, C, COLUMNS // C]), [ROWS, COLUMNS])


@triton.jit
def load_decoded(
    w, scale, second, e, k, n, se, sk, sn, ce, ck, cn, te, tk, tn, K, N,
    CODE: tl.constexpr, PACKED: tl.constexpr, ALONG: tl.constexpr, SK: tl.constexpr, SN: tl.constexpr,
    BYTES: tl.constexpr, SECOND: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """w[e, k : k + BK, n : n + BN] in fp32, and zero past its edges. ALONG: the axis that words hold several of."""
    PK: tl.constexpr = PACKED if ALONG == 0 else 1
    PN: tl.constexpr = PACKED if ALONG == 1 else 1
    rows, columns = k // PK + tl.arange(0, BK // PK), n // PN + tl.arange(0, BN // PN)
    inside = (rows < K // PK)[:, None] & (columns < N // PN)[None, :]
    start = w + e.to(tl.int64) * se
    pointers = start + rows.to(tl.int64)[:, None] * sk + columns.to(tl.int64)[None, :] * sn
    word = spread(tl.load(pointers, mask=inside, other=0).to(tl.int32), BK // PK, BN // PN, BK, BN)
    if CODE == "e4m3":
        value = from_e4m3(word)
    elif CODE == "signed":
        code = word ^ 128
    else:
        if ALONG == 0:
            place = (tl.arange(0, BK) % PACKED)[:, None]
        else:
            place = (tl.arange(0, BN) % PACKED)[None, :]
        if CODE == "int8":
            code = (word >> (8 * place)) & 255
        else:
            code = (word >> (4 * place)) & 15
        if CODE == "e2m1":
            value = from_e2m1(code)
    RK: tl.constexpr = BK // SK if SK < BK else 1
    RN: tl.constexpr = BN // SN if SN < BN else 1
    rows, columns = k // SK + tl.arange(0, RK), n // SN + tl.arange(0, RN)
    inside = (rows * SK < K)[:, None] & (columns * SN < N)[None, :]
    pointers = scale + e.to(tl.int64) * ce + rows.to(tl.int64)[:, None] * ck + columns.to(tl.int64)[None, :] * cn
    if SECOND == 4:
        points = second + e.to(tl.int64) * te + rows.to(tl.int64)[:, None] * tk + columns.to(tl.int64)[None, :] * tn
        point = tl.load(points, mask=inside, other=0).to(tl.int32)
        value = (code - spread(point, RK, RN, BK, BN)).to(tl.float32)
    elif CODE == "int4":
        value = (code - 8).to(tl.float32)
    elif CODE == "int8" or CODE == "signed":
        value = (code - 128).to(tl.float32)
    if BYTES == 0:
        factor = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    elif SECOND == 0:
        factor = from_e8m0(tl.load(pointers, mask=inside, other=127).to(tl.int32))
    else:
        factor = from_e4m3(tl.load(pointers, mask=inside, other=0).to(tl.int32))
        if SECOND == 3:
            whole = tl.load(second + e * te)
        elif ALONG == 0:
            whole = tl.load(second + e * te + columns * tn, mask=columns < N, other=1.0)[None, :]
        else:
            whole = tl.load(second + e * te + rows * tk, mask=rows < K, other=1.0)[:, None]
        if SECOND == 3:
            return value * spread(factor, RK, RN, BK, BN) * whole
        if SECOND == 1:
            factor = factor * whole
        else:
            factor = tl.div_rn(factor, tl.broadcast_to(whole, factor.shape))
    return value * spread(factor, RK, RN, BK, BN)


@triton.jit
def gmm_codes_kernel(
    a, w, scale, second, out, tiles, n_tiles, offsets,
    stride_a, se, sk, sn, ce, ck, cn, te, tk, tn, stride_out, K, N,
    CODE: tl.constexpr, PACKED: tl.constexpr, ALONG: tl.constexpr, SK: tl.constexpr, SN: tl.constexpr,
    BYTES: tl.constexpr, SECOND: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    n_columns = tl.cdiv(N, BN)
    n_row_tiles = tl.load(n_tiles)
    for i in tl.range(tl.program_id(0), n_row_tiles * n_columns, tl.num_programs(0)):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = tl.load(offsets + e + 1)
        n = block * BN
        acc = zeros(BM, BN, SWAP)
        for k in tl.range(0, K, BK):
            a_tile = load_rows(a, row, end, k, K, stride_a, TMA, BM, BK)
            w_tile = load_decoded(
                w, scale, second, e, k, n, se, sk, sn, ce, ck, cn, te, tk, tn, K, N,
                CODE, PACKED, ALONG, SK, SN, BYTES, SECOND, BK, BN,
            )  # fmt: skip
            acc = multiply(a_tile, w_tile.to(a_tile.dtype), acc, SWAP)
        parts = columns_of(finish(acc, SWAP), BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            store_rows(out, parts[p], row, end, 0, n + p * (BN // PARTS), N, stride_out, TMA, BM, BN // PARTS)


def tiles_of(c: Config) -> Config:
    """The tiles of a product of numbers, for one of codes: what is decoded takes registers too."""
    return c._replace(columns=min(c.columns, 128 if c.rows >= 64 else 64), warps=8 if c.rows >= 64 else c.warps)


def gmm(a: Tensor, w: Coded, r: Route, tiling: Tiling) -> Tensor:
    """out [N', N] = a [N', K] @ w[e] [K, N], or with w.turned out [N', K] = a [N', N] @ w[e]^T."""
    turn = (lambda s: (s[0], s[2], s[1])) if w.turned else tuple
    strides = lambda t: tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))
    words, scale, second = w.words.stride(), strides(w.scale), (0, 0, 0) if w.second is None else strides(w.second)
    shape = (len(w.words), w.words.shape[1] * w.packed, w.words.shape[2])
    _, K, N = turn(shape)
    sides = turn((0, *(side or WHOLE for side in w.block)))[1:]
    out = a.new_empty(len(a), N)
    c = tiles_of(config("gmm", a, len(r.slots), r.n_experts, K, tiling, (a, out)))
    rows, tma = row_descriptors(
        {"out": (out[:, None], c.rows, c.columns // c.parts), "a": (a[:, None], c.rows, c.depth)}, c
    )
    a_arg = TensorDescriptor(a, a.shape, a.stride(), [c.rows, c.depth]) if tma else a
    tiles, n_tiles = r.tiles(c.rows)
    run(
        gmm_codes_kernel, grid_of(a, c, len(tiles) * triton.cdiv(N, c.columns)),
        a_arg, w.words, w.scale, w.second, rows["out"], tiles, n_tiles, r.offsets,
        a.stride(0), *turn(words), *turn(scale), *turn(second), N, K, N,
        CODE=w.code, PACKED=w.packed, ALONG=int(w.turned), SK=sides[0], SN=sides[1],
        BYTES=int(w.scale.dtype == torch.uint8),
        SECOND=w.how, TMA=tma, SWAP=c.swap,
        BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=c.parts, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
