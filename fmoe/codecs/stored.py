"""How a file spells the parts of a quantised tensor, and which codes and scales they hold: names, shapes, dtypes.

X is the name of the tensor that the parts say, S the same without its `.weight`. Whatever a file calls them, beside a
decoded X (and beside its codes, where they are kept: `quantized="keep"`) the parts have these names, natively too:

    X_scale_inv                        the scales, one for each block
    X_scale_each, X_scale_expert       scales [E, 1, 1] and [E] of experts
    X_scale_tensor                     one scale, a tensor of no dimensions
    X_activation_expert, _tensor       the same of activations, which decoding has no use for
    X_scale_.., X_scale_.._second      those of a format that no family publishes, each under a suffix of its own, as
                                       matrices: [1, 1] where there is one number. Zero points are a second: uint8, one
                                       for each scale
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from fmoe.codecs import values
from fmoe.codecs.foreign.words import codes_spec, zeros_spec
from fmoe.codecs.values import E4M3, LEAST, PER_BYTE
from fmoe.types import TensorSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


Shape = tuple[int, ...]
SHAPES: Mapping[str, Callable[[Shape], Shape]] = {
    "": lambda s: s,
    "()": lambda s: (),
    "[1]": lambda s: (1,),
    "[o]": lambda s: s[:-1],
    "[i o]": lambda s: (*s[:-2], s[-1], s[-2]),
    "[o 1 i 1]": lambda s: (s[-2], 1, s[-1], 1),
    "[E]": lambda s: s[:1],
}
"""How a file shapes a scale of some rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """w = value(code) * scale, for every number of a tensor [.., R, C] and the one scale of its block.

    With zero points it is (code - zero point) * scale.

    code: what one number is stored as: e4m3, e2m1 or int4. block: rows and columns that share a scale, 0 for all.
    weight, scale: names of the parts. scales: their dtypes, the one first that a fresh export writes; uint8 and e8m0
    are 2^(s - 127). stored: the dtype that holds the codes. beside: what the scales are called once decoded. rank: of
    the scales, where it is not the tensor's. transposed: the tensor's last two dimensions are stored swapped. grouped:
    codes are [.., R, C / 32, 16]. shape: the part that holds the tensor's. activation: the part, if it is there, that
    holds a scale of activations. second: the part that holds a scale of scales, which multiplies them (divides: which
    divides them), or the zero points; zeros: how these are stored, and words: how codes are, a name in
    `foreign/words.py`; unsaid: the version or method that no config says. order: the part, if it is
    there, that says the group of each column. form: the shape of the scale's part where it is none of rows and columns,
    "()", "[1]", "[o]", "[o 1 i 1]" or "[i o]"; lone: the same of second, or "[E]". third: the part that holds what
    second is divided by. late: the scale of scales multiplies what the scale has made of a code. stack: only tensors of
    three dimensions. across: neighbours in a column, not in a row, are stored in one element and share a scale. sizes:
    the block is what codes and scales say, "groups" of columns, or "squares" of powers of two. restarts: (R, n) of
    matrices with R rows that are n of equal size, one after the other, each with blocks of its own; shards: that n.
    method: the quant_method of its config, and for compressed-tensors the format. source: who publishes it.
    """

    name: str
    code: str
    block: tuple[int, int]
    weight: str = "{X}"
    scale: str = "{X}_scale_inv"
    scales: tuple[torch.dtype, ...]
    stored: torch.dtype = E4M3
    beside: str = "_scale_inv"
    rank: int | None = None
    transposed: bool = False
    grouped: bool = False
    shape: str | None = None
    activation: tuple[str, ...] = ()
    second: str | None = None
    third: str | None = None
    divides: bool = False
    late: bool = False
    stack: bool = False
    across: bool = False
    form: str = ""
    lone: str = "()"
    zeros: str = ""
    unsaid: str = ""
    words: str = ""
    order: str | None = None
    restarts: tuple[tuple[int, int], ...] = ()
    shards: int = 1
    sizes: str = ""
    flat: bool = False
    method: str = "fp8"
    source: str = ""

    @property
    def packed(self) -> int:
        """How many numbers one stored element holds."""
        return PER_BYTE[self.code] * (4 if self.stored == torch.int32 else 1)

    @property
    def each(self) -> bool:
        """Whether every expert of a stack has one scale."""
        return self.block == (0, 0) and self.rank != 0 and not self.flat

    @property
    def grouped_by_row(self) -> bool:
        """Whether scales are of whole groups in one row, as those of the microscaling formats."""
        return self.block[0] == 1 and self.block[1] > 1

    def least(self, dtype: torch.dtype) -> float:
        """The least scale under which every code comes back from this dtype."""
        if dtype == torch.float16:  # 2^-24 is its least number, and half of it must be less than half a code
            return {"e4m3": 2.0**-14, "e2m1": 2.0**-22, "int4": 2.0**-23, "int8": 2.0**-23}[self.code]
        wide = self.code == "e2m1" or self.code == "e4m3" and dtype != torch.bfloat16
        return 2.0**-127 if wide else LEAST

    # names, shapes and dtypes

    def spelled(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a file gives a scale of these rows and columns."""
        return SHAPES[self.form](matrix)

    def named(self, name: str) -> Self:
        """The format of a tensor of that name: only fused projections have blocks that begin again."""
        return self if name.endswith("qkv_proj.weight") or not self.restarts else replace(self, restarts=())

    def sized(self, shape: tuple[int, ...], scale: tuple[int, ...]) -> Self:
        """The format, its block as codes of a tensor of that shape and the file's scale say; as it is where none is."""
        rows, columns = self.as_stored(shape)[-2:]
        tried: list[tuple[int, int]] = []
        groups = scale[0 if self.form == "[i o]" else -1] if scale else 0
        if self.sizes == "groups" and groups and columns % groups == 0:
            tried = [(1, columns // groups)]
        elif self.sizes == "squares":
            tried = [self.block, *((n, n) for n in (128, 64, 32, 16, 256))]
        made = [replace(self, shards=n) for R, n in self.restarts if R == rows and self.sizes == "squares"]
        made += [replace(self, block=block) for block in tried]
        return next((f for f in made if f.spelled(f.scale_shape(shape)) == scale), self)

    def codes_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """What stores the codes of a tensor of that shape."""
        if self.across:
            return TensorSpec((*shape[:-2], shape[-2] // self.packed, shape[-1]), self.stored)
        *lead, rows, columns = self.as_stored(shape)
        last = (columns // 32, 16) if self.grouped else (columns // self.packed,)
        return TensorSpec((*lead, rows, *last), self.stored)

    def file_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """What a file has in place of the codes of a tensor of that shape."""
        return codes_spec(self.words, self.codes_spec(shape), self.packed)

    def second_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """What a file has in second beside codes of a tensor of that shape."""
        if self.zeros:
            return zeros_spec(self.zeros, self.scale_shape(shape), self.packed)
        return TensorSpec(SHAPES[self.lone](shape if self.stack else (1, 1)), torch.float32)

    def held_second(self, shape: tuple[int, ...]) -> TensorSpec:
        """What second is beside a tensor of that shape."""
        if self.stack:
            return self.second_spec(shape)
        return TensorSpec(self.scale_shape(shape), torch.uint8) if self.zeros else TensorSpec((1, 1), torch.float32)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.shards > 1:
            n, rows, columns = values.grid((self.shards, shape[0] // self.shards, shape[1]), self.block)
            return n * rows, columns
        full = values.grid(self.as_stored(shape), self.block)
        return full if self.rank is None else full[: self.rank]

    def decoded(self, codes: TensorSpec) -> tuple[int, ...] | None:
        """The shape of the tensor that codes of this shape and dtype hold; None where they are not of this format."""
        shape = codes.shape
        if codes.dtype != self.stored or len(shape) < 2 + self.grouped or self.grouped and shape[-1] != 16:
            return None
        flat = (*shape[:-2], shape[-2] * 16) if self.grouped else shape
        flat = (*shape[:-2], shape[-1], shape[-2]) if self.across else flat
        made = self.as_stored((*flat[:-1], flat[-1] * self.packed))
        made = (*made[:-2], made[-1], made[-2]) if self.across else made
        return made if self.sizes == "groups" or self.fits(made) else None

    def kept_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """What holds the codes where they are kept: groups of them in a row, rows as they are stored."""
        spec = self.codes_spec(shape)
        flat = (*spec.shape[:-2], spec.shape[-2] * 16) if self.grouped else spec.shape
        return TensorSpec(flat, spec.dtype)

    def kept_shape(self, kept: TensorSpec) -> tuple[int, ...] | None:
        """The shape of the tensor whose kept codes have this shape and dtype."""
        if len(kept.shape) < 2 or self.grouped and kept.shape[-1] % 16:
            return None
        codes = (*kept.shape[:-1], kept.shape[-1] // 16, 16) if self.grouped else kept.shape
        return self.decoded(TensorSpec(codes, kept.dtype))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape can be stored so: a matrix or more; 4-bit and 1x32 in whole groups."""
        if len(shape) < 2 or self.each and len(shape) != 3 and not self.flat or self.flat and len(shape) != 2:
            return False
        if self.stack and len(shape) != 3 or self.across and shape[-2] % self.block[0]:
            return False
        return not self.grouped_by_row or self.as_stored(shape)[-1] % self.block[1] == 0

    def as_stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
