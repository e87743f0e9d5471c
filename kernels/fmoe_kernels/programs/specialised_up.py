"""`up` for Hopper by warps of two kinds, in Gluon: four gather rows and ask for weights, two groups of four multiply.

As `specialised`, and as little run. For gate and up halves, and a width that is a multiple of a step's depth.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, run
from fmoe_kernels.programs.route import Route
from fmoe_kernels.programs.scalars import SCALARS
from fmoe_kernels.programs.specialised import columns_of, load_tile, pick_tile, store_tile, with_layout

# what triton 3.6 and later ones call a copy of what pointers point to
load_rows: Any = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def feed(
    x, tokens, w, x_smem, w_smem, full, empty, tiles, n_row_tiles, offsets, stride_x, D, I,
    K_MAJOR: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = x_smem.shape[0]
    BM: gl.constexpr = x_smem.shape[1]
    BK: gl.constexpr = x_smem.shape[2]
    BN: gl.constexpr = w_smem.shape[1] if K_MAJOR else w_smem.shape[2]
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    n_columns = gl.cdiv(I, BN)
    columns = gl.arange(0, BK, gl.SliceLayout(0, GATHER))
    step = 0
    for i in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        rows = row + gl.arange(0, BM, gl.SliceLayout(1, GATHER))
        token = gl.load(tokens + rows, mask=rows < gl.load(offsets + e + 1), other=0).to(gl.int64)
        pointers = x + token[:, None] * stride_x + columns[None, :]
        for k in range(0, D, BK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), 2 * w.block_type.nbytes)
            for half in gl.static_range(2):
                if K_MAJOR:
                    load_tile(w, [e, half, block * BN, k], full.index(stage), w_smem.index(2 * stage + half))
                else:
                    load_tile(w, [e, half, k, block * BN], full.index(stage), w_smem.index(2 * stage + half))
            load_rows(x_smem.index(stage), pointers + k)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit
def multiply(
    z, a, slots, weights, x_smem, w_smem, out_smem, full, empty, tiles, n_row_tiles, offsets, D, I, alpha, limit,
    ACT: gl.constexpr, SAVE: gl.constexpr, WEIGHTED: gl.constexpr, K_MAJOR: gl.constexpr, GROUP: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = x_smem.shape[0]
    BM: gl.constexpr = x_smem.shape[1]
    BK: gl.constexpr = x_smem.shape[2]
    BN: gl.constexpr = w_smem.shape[1] if K_MAJOR else w_smem.shape[2]
    PART: gl.constexpr = BN // PARTS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    n_columns = gl.cdiv(I, BN)
    far = 1 << 30
    step = 0
    for i in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = gl.load(offsets + e + 1)
        g = gl.zeros([BM, BN], gl.float32, LAYOUT)
        v = gl.zeros([BM, BN], gl.float32, LAYOUT)
        for k in range(0, D, BK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()  # rows were copied by threads, and are read by the matrix units
            g_tile, v_tile = w_smem.index(2 * stage), w_smem.index(2 * stage + 1)
            if K_MAJOR:
                g_tile, v_tile = g_tile.permute((1, 0)), v_tile.permute((1, 0))
            g = warpgroup_mma(x_smem.index(stage), g_tile, g, is_async=True)
            v = warpgroup_mma(x_smem.index(stage), v_tile, v, is_async=True)
            g, v = warpgroup_mma_wait(2, deps=[g, v])
            # two products are in flight: those of the step before have read their stage
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        g, v = warpgroup_mma_wait(0, deps=[g, v])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        gs, vs = columns_of(g, BM, BN, PARTS), columns_of(v, BM, BN, PARTS)
        for p in gl.static_range(PARTS):
            y, _, _ = ACT(gs[p], vs[p], alpha, limit)
            if WEIGHTED:
                rows = row + gl.arange(0, BM, gl.SliceLayout(1, y.type.layout))
                slot = gl.load(slots + rows, mask=rows < end, other=0)
                y *= gl.load(weights + slot, mask=rows < end, other=0.0)[:, None]
            n = block * BN + p * PART
            tma.store_wait(0)
            if SAVE:
                out_smem.index(0).store(gs[p].to(out_smem.dtype))
                out_smem.index(1).store(vs[p].to(out_smem.dtype))
            out_smem.index(2).store(y.to(out_smem.dtype))
            fence_async_shared()
            if SAVE:
                store_tile(z, [far, end, far - (end - row), 0, n], out_smem.index(0))
                store_tile(z, [far, end, far - (end - row), 1, n], out_smem.index(1))
            store_tile(a, [far, end, far - (end - row), 0, n], out_smem.index(2))
    tma.store_wait(0)


@gluon.jit
def up_kernel(
    tiles, n_tiles, offsets, x, slots, tokens, weights, w, z, a, stride_x, D, I, alpha, limit,
    ACT: gl.constexpr, SAVE: gl.constexpr, WEIGHTED: gl.constexpr, K_MAJOR: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    SHAPE: gl.constexpr = [BN, BK] if K_MAJOR else [BK, BN]
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], w.dtype)
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, w.dtype)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN // PARTS], w.dtype)
    x_smem = gl.allocate_shared_memory(w.dtype, [STAGES, BM, BK], X_LAYOUT)
    w_smem = gl.allocate_shared_memory(w.dtype, [2 * STAGES, SHAPE[0], SHAPE[1]], W_LAYOUT)
    out_smem = gl.allocate_shared_memory(w.dtype, [3, BM, BN // PARTS], OUT_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(
            full.index(s), count=1 + 128
        )  # the one that says how many bytes come, and every thread that gathers
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    n_row_tiles = gl.load(n_tiles)
    gl.warp_specialize(
        [
            (multiply, (z, a, slots, weights, x_smem, w_smem, out_smem, full, empty, tiles, n_row_tiles, offsets, D, I,
                        alpha, limit, ACT, SAVE, WEIGHTED, K_MAJOR, GROUP, PARTS)),
            (feed, (x, tokens, w, x_smem, w_smem, full, empty, tiles, n_row_tiles, offsets, stride_x, D, I, K_MAJOR,
                    GROUP)),
        ],
        [4],
        [56],
    )  # fmt: skip


def up(
    x: Tensor, w: Any, z: Any, a: Any, weights: Tensor | None, tiles: Tensor, n_tiles: Tensor, r: Route, act: Act,
    k_major: bool, save: bool, grid: tuple[int], c: Config,
) -> None:  # fmt: skip
    """a and z, where it is saved, by descriptors as `programs.up` makes them."""
    run(
        up_kernel, grid, tiles, n_tiles, r.offsets, x, r.slots, r.tokens, weights, *map(with_layout, (w, z, a)),
        x.stride(0), x.shape[1], a.shape[4], *act[1:], ACT=SCALARS[act.name], SAVE=save, WEIGHTED=weights is not None,
        K_MAJOR=k_major, BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=c.parts, STAGES=c.stages,
        num_warps=c.warps,
    )  # fmt: skip
