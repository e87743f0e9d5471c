"""The gradient of a grouped product by its weights: out[e] = sum over the rows n of e of left[n]^T right[token of n].

The sum runs over the ragged rows of one expert, in order. An expert without rows gets zeros.
"""

import triton
import triton.language as tl
from torch import Tensor

from fmoe_kernels.host.launch import Tiling, config, grid_of, row_descriptors, run, weight_descriptor
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.tiles import columns_of, load_ragged


@triton.jit
def dw_kernel(
    left, right, tokens, out, offsets,
    stride_left, stride_right, oe, op, oq, E, P, Q,
    TMA: tl.constexpr, TMA_OUT: tl.constexpr, P_MAJOR: tl.constexpr, EVEN_Q: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = BQ // PARTS
    n_p, n_q = tl.cdiv(P, BP), tl.cdiv(Q, BQ)
    for i in tl.range(tl.program_id(0), E * n_p * n_q, tl.num_programs(0), disable_licm=True):
        e, j = i // (n_p * n_q), i % (n_p * n_q)
        width = GROUP * n_q
        first = (j // width) * GROUP
        size = min(n_p - first, GROUP)
        p, q = (first + (j % width) % size) * BP, ((j % width) // size) * BQ
        start, end = tl.load(offsets + e), tl.load(offsets + e + 1)
        columns = q + tl.arange(0, BQ)
        acc = tl.zeros([BP, BQ], tl.float32)
        # the tokens of the next step are loaded one step ahead: a load inside would eat the pipeline's stages
        inside = start + tl.arange(0, BK) < end
        token = tl.load(tokens + start + tl.arange(0, BK), mask=inside, other=0)
        for row in tl.range(start, end, BK):
            mask = inside[:, None]
            if not EVEN_Q:
                mask = mask & (columns < Q)[None, :]
            right_tile = tl.load(
                right + token.to(tl.int64)[:, None] * stride_right + columns[None, :], mask=mask, other=0.0
            )
            left_tile = load_ragged(left, row, end, 0, p, P, stride_left, TMA, BK, BP)
            acc = tl.dot(left_tile.T, right_tile, acc, input_precision="ieee")
            inside = row + BK + tl.arange(0, BK) < end
            token = tl.load(tokens + row + BK + tl.arange(0, BK), mask=inside, other=0)
        parts = columns_of(acc, BP, BQ, PARTS)
        for r in tl.static_range(PARTS):
            store_part(out, parts[r], e, p, q + r * PART, P, Q, oe, op, oq, TMA_OUT, P_MAJOR, BP, PART)


@triton.jit
def store_part(
    out, value, e, p, q, P, Q, oe, op, oq,
    TMA: tl.constexpr, P_MAJOR: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """out[e, p : p + BP, q : q + BQ] = value, for out [E, P, Q] of any strides."""
    if TMA:
        if P_MAJOR:
            out.store([e, 0, q, p], value.T.to(out.dtype).reshape(1, 1, BQ, BP))
        else:
            out.store([e, 0, p, q], value.to(out.dtype).reshape(1, 1, BP, BQ))
    else:
        rows, columns = p + tl.arange(0, BP), q + tl.arange(0, BQ)
        pointers = out + e.to(tl.int64) * oe + rows.to(tl.int64)[:, None] * op + columns.to(tl.int64)[None, :] * oq
        tl.store(pointers, value.to(out.dtype.element_ty), mask=(rows < P)[:, None] & (columns < Q)[None, :])


def dw(left: Tensor, right: Tensor, r: Route, out: Tensor, tiling: Tiling) -> Tensor:
    """out [E, P, Q] of any strides = the sum over the rows n of e of left[n]^T [P] right[token of n] [Q]."""
    E, P, Q = out.shape
    c = config("dw", left, len(r.slots), r.n_experts, len(left) // E, tiling, (left, right, out))
    rows, tma = row_descriptors({"left": (left[:, None], c.depth, c.rows)}, c)
    out_arg, tma_out, p_major = weight_descriptor(out[:, None], c, c.rows, c.columns // c.parts)
    grid = grid_of(left, c, E * triton.cdiv(P, c.rows) * triton.cdiv(Q, c.columns))
    run(
        dw_kernel, grid, rows["left"], right, r.tokens, out_arg, r.offsets, left.stride(0), right.stride(0),
        *out.stride(), E, P, Q, TMA=tma, TMA_OUT=tma_out, P_MAJOR=p_major, EVEN_Q=Q % c.columns == 0,
        BP=c.rows, BQ=c.columns, BK=c.depth, GROUP=c.group, PARTS=c.parts, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
