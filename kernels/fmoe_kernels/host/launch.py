"""From tensors to launches: how tiles are chosen, descriptors made and grids sized, for every kernel here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from fmoe_kernels.host import configs
from fmoe_kernels.host.check import PLAIN, answers
from fmoe_kernels.host.configs import Config

Tile: TypeAlias = Tensor | TensorDescriptor


class Act(NamedTuple):
    """An activation by name, with its constants."""

    name: str
    alpha: float
    limit: float


class Tiling(NamedTuple):
    """How tiles are chosen: a table's path (empty: the shipped one), and whether whatever the number of rows.

    only: these tiles, whatever the table says.
    """

    table: str = ""
    batch_invariant: bool = False
    only: Config | None = None


def config(
    kernel: str, x: Tensor, n_rows: int, n_experts: int, depth: int, tiling: Tiling, moved: tuple[Tensor, ...]
) -> Config:
    """The tiles of a kernel that multiplies n_rows rows of x's dtype, `depth` deep, and moves tiles of `moved`."""
    if tiling.only:
        return tiling.only
    aligned, (table, invariant, _) = all(map(_even, moved)), tiling
    return configs.pick(kernel, x.device, x.dtype, n_rows, n_experts, depth, invariant, table, aligned)


def row_descriptors(tensors: dict[str, tuple[Any, ...]], c: Config) -> tuple[dict[str, Tile], bool]:
    """Each [N', G, W] tensor as a descriptor of tiles of so many rows, columns and (else 1) halves, if all can be."""
    if not (c.tma and all(movable(y, y.stride(0), y.shape[2]) for y, *_ in tensors.values())):
        return {name: y for name, (y, *_) in tensors.items()}, False
    return {name: rows_descriptor(*t) for name, t in tensors.items()}, True


def rows_descriptor(y: Tensor, rows: int, columns: int, halves: int = 1) -> TensorDescriptor:
    """y [N', G, W] such that index (2^30, end, 2^30 - n, g, w) is row end - n, and any row from `end` on is outside.

    The third dimension ends at 2^30; the first two move the address by 2^30 * (2^34 - s) + end * s elements, which in
    64 bits is (end - 2^30) * s. So a tile stops at the end of its expert without a mask.
    """
    s = y.stride(0)
    far, big = 2**30, 2**31 - 2**16
    return TensorDescriptor(
        y, [big, big, far, y.shape[1], y.shape[2]], [2**34 - s, s, s, y.shape[2], 1], [1, 1, rows, halves, columns]
    )


def weight_descriptor(w4: Tensor, c: Config, depth: int, columns: int) -> tuple[Tile, bool, bool]:
    """(w [E, G, K, N] as a descriptor if it can be one, whether it is, whether K is its dense dimension)."""
    e, g, k, n = w4.stride()
    if c.tma and n == 1 and movable(w4, e, g, k):
        return TensorDescriptor(w4, w4.shape, w4.stride(), [1, 1, depth, columns]), True, False
    if c.tma and k == 1 and movable(w4, e, g, n):
        return TensorDescriptor(w4, w4.mT.shape, w4.mT.stride(), [1, 1, columns, depth]), True, True
    return w4, False, False


def grid_of(x: Tensor, c: Config, tiles: int) -> tuple[int]:
    """Persistent programs: as many as run at once, at most one a tile."""
    at_once = torch.cuda.get_device_properties(x.device).multi_processor_count * c.ctas if x.is_cuda else 3
    return (max(1, min(tiles, at_once)),)


def run(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches on the device of the first argument, whatever the current one is.

    Raises ValueError for bf16 in an interpreter that takes its bits for integers, as Triton's does.
    """
    first = args[0].base if isinstance(args[0], TensorDescriptor) else args[0]
    if not isinstance(_probe, triton.JITFunction):
        bases = (a.base if isinstance(a, TensorDescriptor) else a for a in (*args, *constants.values()))
        if any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in bases) and not _bf16_is_right():
            raise ValueError(
                "fmoe_kernels: a tensor is bfloat16, which Triton's interpreter multiplies wrongly, expected float32 or"
                " float16 with TRITON_INTERPRET=1, or a GPU; use fmoe_kernels.reference or the backend torch_mm"
            )
    with torch.accelerator.device_index(first.device.index):
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def check_runs(**tensors: Tensor | None) -> None:
    """Raises ValueError where one of these has no data of its own, or is on a CPU and kernels are compiled here."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.is_meta or is_fake(t):
            raise ValueError(f"fmoe_kernels: {name} is on meta or fake, which has no data, expected a tensor on a GPU")
        if type(t) not in PLAIN and answers(type(t), torchs=True):
            told = f"{name} is of type {type(t).__name__}, whose data is elsewhere, expected a plain tensor"
            raise ValueError(f"fmoe_kernels: {told}")
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            told = "is inside a transform of torch.func, which raw products have no rules for"
            raise ValueError(f"fmoe_kernels: {name} {told}; use fmoe_kernels.experts, or fmoe_kernels.reference")
        if t.device.type == "cpu" and isinstance(_probe, triton.JITFunction):
            raise ValueError(
                f"fmoe_kernels: {name} is on the CPU, expected a GPU; use fmoe_kernels.reference,"
                " or set TRITON_INTERPRET=1 before fmoe_kernels is imported, to run the kernels in Triton's interpreter"
            )


@contextmanager
def tiles_of(table: str) -> Iterator[None]:
    """What the compiler refuses of tiles that a user's table has is a ValueError that names it."""
    try:
        yield
    except TritonError as error:
        if not table:
            raise
        told = f"fmoe_kernels: table {table!r} has tiles that do not launch here: {error}"
        raise ValueError(f"{told}. Fix: let fmoe_kernels.tune write one on this device") from error


@triton.jit
def _square(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x + at)
    tl.store(y + at, tl.dot(a, a).to(y.dtype.element_ty))


def _bf16_is_right() -> bool:
    """Whether the interpreter multiplies bf16, as it does where its products are mended."""
    x = torch.full((16, 16), 1.5, dtype=torch.bfloat16)
    y = torch.zeros_like(x)
    _square[(1,)](x, y, BLOCK=16)
    return bool((y == 36).all())


@triton.jit
def _probe() -> None:
    """Never launched: what kind of function it became tells whether kernels are interpreted."""


def dense(x: Tensor) -> Tensor:
    """x [N, D] with dense rows, as gathers read them; what is expanded, or negated lazily, is written out here."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def flat(t: Tensor) -> Tensor:
    """t in one dense row, as numbers of slots and rows are read; `flatten` may keep a step of 2, or of 0."""
    return t.contiguous().flatten().resolve_neg()


def _even(t: Tensor) -> bool:
    """Is t dense along rows or columns, and does each of these start at a multiple of 16 bytes?"""
    *others, row, column = t.stride()
    return (column == 1 or row == 1) and movable(t, *others, max(row, column))


def movable(t: Tensor, *strides: int) -> bool:
    """May a descriptor be made? A step of zero, as `expand` leaves it, has none."""
    return t.data_ptr() % 16 == 0 and all(s > 0 and s * t.itemsize % 16 == 0 for s in strides)
