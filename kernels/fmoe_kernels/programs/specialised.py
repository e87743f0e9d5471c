"""`gmm` for Hopper by warps of two kinds, in Gluon: one warp asks for operands, two groups of four multiply and store.

The loads of the next tile run while a tile is stored. Whoever loads waits for a stage to be `empty`, whoever multiplies
for it to be `full`; both count the same steps over the same tiles. No interpreter runs Gluon, so nothing but the
compiler has ever seen this, and no shipped table has it: tiles take it by `specialised=True`, for 16 bits that
descriptors can move, without bias. What does not fit is multiplied by the twin in `gmm`, with the same tiles.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools import tensor_descriptor

from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import movable, run
from fmoe_kernels.programs.route import Route

# what triton 3.6 and later ones call a copy by descriptor
load_tile: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def pick_tile(i, tiles, n_row_tiles, n_columns, GROUP: gl.constexpr):
    """(expert, first row, column block) of tile i, as `tiles.pick_tile`."""
    width = GROUP * n_columns
    first = (i // width) * GROUP
    size = gl.minimum(n_row_tiles - first, GROUP)
    m = first + (i % width) % size
    return gl.load(tiles + 2 * m), gl.load(tiles + 2 * m + 1), (i % width) // size


@gluon.jit
def feed(a, w, a_smem, w_smem, full, empty, tiles, n_row_tiles, K, N, K_MAJOR: gl.constexpr, GROUP: gl.constexpr):
    STAGES: gl.constexpr = a_smem.shape[0]
    BK: gl.constexpr = a_smem.shape[2]
    BN: gl.constexpr = w_smem.shape[1] if K_MAJOR else w_smem.shape[2]
    n_columns = gl.cdiv(N, BN)
    step = 0
    for i in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        for k in range(0, K, BK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(stage), a.block_type.nbytes + w.block_type.nbytes)
            load_tile(a, [row, k], full.index(stage), a_smem.index(stage))
            if K_MAJOR:
                load_tile(w, [e, 0, block * BN, k], full.index(stage), w_smem.index(stage))
            else:
                load_tile(w, [e, 0, k, block * BN], full.index(stage), w_smem.index(stage))
            step += 1


@gluon.jit
def multiply(
    out, a_smem, w_smem, out_smem, full, empty, tiles, n_row_tiles, offsets, K, N,
    K_MAJOR: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = a_smem.shape[0]
    BM: gl.constexpr = a_smem.shape[1]
    BK: gl.constexpr = a_smem.shape[2]
    BN: gl.constexpr = w_smem.shape[1] if K_MAJOR else w_smem.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    n_columns = gl.cdiv(N, BN)
    far = 1 << 30
    step = 0
    for i in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        e, row, block = pick_tile(i, tiles, n_row_tiles, n_columns, GROUP)
        end = gl.load(offsets + e + 1)
        acc = gl.zeros([BM, BN], gl.float32, LAYOUT)
        for k in range(0, K, BK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            w_tile = w_smem.index(stage)
            if K_MAJOR:
                w_tile = w_tile.permute((1, 0))
            acc = warpgroup_mma(a_smem.index(stage), w_tile, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # one product is in flight: that of the step before has read its stage
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        parts = columns_of(acc, BM, BN, PARTS)
        for p in gl.static_range(PARTS):
            tma.store_wait(0)
            out_smem.store(parts[p].to(out_smem.dtype))
            fence_async_shared()
            store_tile(out, [far, end, far - (end - row), 0, block * BN + p * (BN // PARTS)], out_smem)
    tma.store_wait(0)


@gluon.jit
def columns_of(tile, BM: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr):
    """As `tiles.columns_of`."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tile.reshape([BM, 2, BN // 2]).permute(0, 2, 1).split()
        parts = columns_of(left, BM, BN // 2, PARTS // 2) + columns_of(right, BM, BN // 2, PARTS // 2)
    return parts


@gluon.jit
def gmm_kernel(
    tiles, n_tiles, offsets, a, w, out, K, N,
    K_MAJOR: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SHAPE: gl.constexpr = [BN, BK] if K_MAJOR else [BK, BN]
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(SHAPE, w.dtype)
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN // PARTS], out.dtype)
    a_smem = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    w_smem = gl.allocate_shared_memory(w.dtype, [STAGES, SHAPE[0], SHAPE[1]], W_LAYOUT)
    out_smem = gl.allocate_shared_memory(out.dtype, [BM, BN // PARTS], OUT_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    n_row_tiles = gl.load(n_tiles)
    gl.warp_specialize(
        [
            (multiply, (out, a_smem, w_smem, out_smem, full, empty, tiles, n_row_tiles, offsets, K, N, K_MAJOR, GROUP,
                        PARTS)),
            (feed, (a, w, a_smem, w_smem, full, empty, tiles, n_row_tiles, K, N, K_MAJOR, GROUP)),
        ],
        [1],  # a warp feeds, and its threads keep 24 registers each
        [24],
    )  # fmt: skip


def takes(kernel: str, c: Config, x: Tensor) -> bool:
    """Do these tiles ask for it, and can it load rows as x has them? Raises ValueError where no device can."""
    if c.specialised and (arch := configs.architecture(x.device)) != "sm_90":
        raise ValueError(
            f"{kernel}: tiles are {c}, which only sm_90 runs, found {arch}. Fix: a table without `specialised`"
        )
    return c.specialised and x.dtype in DTYPES and movable(x, x.stride(0))


def gmm(
    a: tensor_descriptor.TensorDescriptor, w: tensor_descriptor.TensorDescriptor,
    out: tensor_descriptor.TensorDescriptor, tiles: Tensor, n_tiles: Tensor, r: Route, k_major: bool,
    grid: tuple[int], c: Config,
) -> None:  # fmt: skip
    """out = a @ w by descriptors as `programs.gmm` makes them."""
    K, N = a.shape[1], out.shape[4]
    run(
        gmm_kernel, grid, tiles, n_tiles, r.offsets, *map(with_layout, (a, w, out)), K, N, K_MAJOR=k_major,
        BM=c.rows, BN=c.columns, BK=c.depth, GROUP=c.group, PARTS=c.parts, STAGES=c.stages, num_warps=c.warps,
    )  # fmt: skip


def with_layout(d: tensor_descriptor.TensorDescriptor) -> TensorDescriptor:
    """The descriptor as Gluon takes it: its tiles have a layout in shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for(d.block_shape, DTYPES[d.base.dtype])
    return TensorDescriptor(d.base, d.shape, d.strides, d.block_shape, layout)
