"""Tiles: which expert, rows and columns a program multiplies, and how tiles of rows and weights move.

Rows of one expert are contiguous: expert e owns rows offsets[e] : offsets[e + 1]. A tile never straddles two experts.
Everything moves either through descriptors (TMA on Hopper and later) or through pointers and masks (everywhere).
"""

import triton
import triton.language as tl


@tl.core.builtin
def map_element(function, *args, _semantic=None, _generator=None):
    """`tl.map_elementwise` of a function that is itself an argument of the kernel."""
    return tl.map_elementwise(function.value, *args, _semantic=_semantic, _generator=_generator)


@triton.jit
def pick_tile(i, tiles, n_row_tiles, n_columns, GROUP: tl.constexpr):
    """(expert, first row, column block) of tile i: GROUP row tiles take one column block together, for L2."""
    width = GROUP * n_columns
    first = (i // width) * GROUP
    size = min(n_row_tiles - first, GROUP)
    m = first + (i % width) % size
    return tl.load(tiles + 2 * m), tl.load(tiles + 2 * m + 1), (i % width) // size


@triton.jit
def pick_rows(slots, tokens, row, end, BM: tl.constexpr):
    """(rows, which of them exist, their slots, their tokens); rows past the end stand in for slot 0 of token 0."""
    rows = row + tl.arange(0, BM)
    inside = rows < end
    slot = tl.load(slots + rows, mask=inside, other=0)
    return rows, inside, slot, tl.load(tokens + rows, mask=inside, other=0).to(tl.int64)


@triton.jit
def load_gathered(x, token, stride, k, K, EVEN_K: tl.constexpr, BK: tl.constexpr):
    """x[token, k : k + BK] as [rows, BK]; columns past K are zero."""
    columns = k + tl.arange(0, BK)
    pointers = x + token[:, None] * stride + columns[None, :]
    if EVEN_K:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=columns[None, :] < K, other=0.0)
    return tile


@triton.jit
def load_rows(y, row, end, k, K, stride, TMA: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """y[row : row + BM, k : k + BK]; rows past the end are anything that is in memory, or zero."""
    if TMA:
        tile = y.load([row, k])
    else:
        rows, columns = row + tl.arange(0, BM), k + tl.arange(0, BK)
        inside = (rows < end)[:, None] & (columns < K)[None, :]
        tile = tl.load(y + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def load_ragged(y, row, end, g, n, N, stride, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y[row : row + BM, g, n : n + BN] for y [rows, G, N]; rows past the end are zero."""
    if TMA:
        far = tl.full([], 1 << 30, tl.int32)
        tile = y.load([far, end, far - (end - row), g, n]).reshape(BM, BN)
    else:
        rows, columns = row + tl.arange(0, BM), n + tl.arange(0, BN)
        inside = (rows < end)[:, None] & (columns < N)[None, :]
        tile = tl.load(y + rows.to(tl.int64)[:, None] * stride + g * N + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def load_halves(y, row, end, n, N, stride, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y[row : row + BM, 0 and 1, n : n + BN], two tiles by one copy, for y [rows, 2, N]; rows past the end are zero."""
    if TMA:
        far = tl.full([], 1 << 30, tl.int32)
        both = y.load([far, end, far - (end - row), 0, n])
        first, second = both.reshape(BM, 2, BN).permute(0, 2, 1).split()
    else:
        first = load_ragged(y, row, end, 0, n, N, stride, TMA, BM, BN)
        second = load_ragged(y, row, end, 1, n, N, stride, TMA, BM, BN)
    return first, second


@triton.jit
def prefetch_halves(y, row, end, n, N, stride, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr):
    """Asks L2 for y[row : min(row + BM, end), :, n : n + BN], for y [rows, G, N] of 16 bits, and waits for nothing."""
    LINES: tl.constexpr = (BN + 63) // 64  # of 128 bytes
    rows = tl.minimum(row + tl.arange(0, BM), end - 1).to(tl.int64)
    line = tl.arange(0, G * LINES)
    columns = (line // LINES) * N + tl.minimum(n + (line % LINES) * 64, N - 1)
    pointers = y + rows[:, None] * stride + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load_weight(
    w, e, g, k, n, se, sg, sk, sn, K, N,
    TMA: tl.constexpr, K_MAJOR: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """w[e, g, k : k + BK, n : n + BN] of a weight [E, G, K, N] of any strides; what is past its edges is zero."""
    if TMA:
        if K_MAJOR:
            tile = w.load([e, g, n, k]).reshape(BN, BK).T
        else:
            tile = w.load([e, g, k, n]).reshape(BK, BN)
    else:
        rows, columns = k + tl.arange(0, BK), n + tl.arange(0, BN)
        start = w + e.to(tl.int64) * se + g * sg
        pointers = start + rows.to(tl.int64)[:, None] * sk + columns.to(tl.int64)[None, :] * sn
        if EVEN:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(rows < K)[:, None] & (columns < N)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(y, value, row, end, g, n, N, stride, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y[row : min(row + BM, end), g, n : n + BN] = value [BM, BN], for y [rows, G, N]."""
    if TMA:
        tile = value.to(y.dtype).reshape(1, 1, BM, 1, BN)
        # rows of the next expert are outside of this descriptor: see `rows_descriptor` in launch.py
        far = tl.full([], 1 << 30, tl.int32)
        y.store([far, end, far - (end - row), g, n], tile)
    else:
        rows, columns = row + tl.arange(0, BM), n + tl.arange(0, BN)
        inside = (rows < end)[:, None] & (columns < N)[None, :]
        pointers = y + rows.to(tl.int64)[:, None] * stride + g * N + columns[None, :]
        tl.store(pointers, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def multiply(a, w, acc, SWAP: tl.constexpr):
    """acc + a @ w, for acc [BM, BN]; or its transpose, where few rows would leave the matrix units idle."""
    if SWAP:
        acc = tl.dot(w.T, a.T, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, w, acc, input_precision="ieee")
    return acc


@triton.jit
def zeros(BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    """What `multiply` starts from."""
    if SWAP:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BM, BN], tl.float32)
    return acc


@triton.jit
def finish(acc, SWAP: tl.constexpr):
    """The [BM, BN] that `multiply` has summed."""
    if SWAP:
        acc = acc.T
    return acc


@triton.jit
def columns_of(tile, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """The column parts of a tile [BM, BN], from left to right: epilogues take them one by one to spare registers."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tile.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        parts = columns_of(left, BM, BN // 2, PARTS // 2) + columns_of(right, BM, BN // 2, PARTS // 2)
    return parts
