"""What a format is: how a file spells the parts of a quantised tensor, and which codes and scales they hold.

X is the name of the tensor that the parts say, S the same without its `.weight`. Whatever a file calls them, beside a
decoded X (and beside its codes, where they are kept: `quantized="keep"`) the parts have these names, natively too:

    X_scale_inv                        the scales, one for each block
    X_scale_each, X_scale_expert       scales [E, 1, 1] and [E] of experts
    X_scale_tensor                     one scale, a tensor of no dimensions
    X_activation_expert, _tensor       the same of activations, which decoding has no use for
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmoe.codecs import blocks, values
from fmoe.codecs.values import E4M3, LEAST, MOST
from fmoe.types import TensorSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Format:
    """w = value(code) * scale, for every number of a tensor [.., R, C] and the one scale of its block.

    code: what one number is stored as: e4m3, e2m1 or int4. block: rows and columns that share a scale, 0 for all.
    weight, scale: names of the parts. scales: their dtypes, the one first that a fresh export writes; uint8 and e8m0
    are 2^(s - 127). stored: the dtype that holds the codes. beside: what the scales are called once decoded.
    rank: of the scales, where it is not the tensor's. transposed: the tensor's last two dimensions are stored swapped.
    grouped: codes are [.., R, C / 32, 16]. zero: a scale byte 0 is the factor 0. shape: the part that holds the
    tensor's. activation: the part, if it is there, that holds a scale of activations. method: the quant_method of its
    config, and for compressed-tensors the format. source: who publishes it.
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
    zero: bool = False
    shape: str | None = None
    activation: tuple[str, ...] = ()
    method: str = "fp8"
    source: str = ""

    @property
    def packed(self) -> int:
        """How many numbers one stored element holds."""
        return {"e4m3": 1, "e2m1": 2, "int4": 8}[self.code]

    @property
    def each(self) -> bool:
        """Whether every expert of a stack has one scale."""
        return self.block == (0, 0) and self.rank != 0

    @property
    def grouped_by_row(self) -> bool:
        """Whether scales are of whole groups in one row, as those of the microscaling formats."""
        return self.block[0] == 1 and self.block[1] > 1

    def least(self, dtype: torch.dtype) -> float:
        """The least scale under which every code comes back from this dtype."""
        if dtype == torch.float16:  # 2^-24 is its least number, and half of it must be less than half a code
            return {"e4m3": 2.0**-14, "e2m1": 2.0**-22, "int4": 2.0**-23}[self.code]
        return 2.0**-127 if self.code == "e2m1" else LEAST

    # names, shapes and dtypes

    def codes_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """What stores the codes of a tensor of that shape."""
        *lead, rows, columns = self.as_stored(shape)
        last = (columns // 32, 16) if self.grouped else (columns // self.packed,)
        return TensorSpec((*lead, rows, *last), self.stored)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        full = values.grid(self.as_stored(shape), self.block)
        return full if self.rank is None else full[: self.rank]

    def decoded(self, codes: TensorSpec) -> tuple[int, ...] | None:
        """The shape of the tensor that codes of this shape and dtype hold; None where they are not of this format."""
        shape = codes.shape
        if codes.dtype != self.stored or len(shape) < 2 + self.grouped or self.grouped and shape[-1] != 16:
            return None
        flat = (*shape[:-2], shape[-2] * 16) if self.grouped else shape
        made = self.as_stored((*flat[:-1], flat[-1] * self.packed))
        return made if self.fits(made) else None

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
        if len(shape) < 2 or self.each and len(shape) != 3:
            return False
        return not self.grouped_by_row or self.as_stored(shape)[-1] % self.block[1] == 0

    def as_stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    # tensors

    def decode(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None
    ) -> Tensor:
        """value(code) * scale in fp32, rounded to dtype (exact in bf16 where scales are powers of two).

        out: storage to decode into, of the result's shape and dtype, contiguous as the codes lie. Raises ValueError for
        another shape or dtype, for a scale that is NaN, infinite, negative or too large for dtype, and for codes other
        than 0 under a scale so small (or 0) that they could not be told from the result.
        """
        shape = self.decoded(TensorSpec(tuple(codes.shape), codes.dtype))
        if shape is None:
            raise ValueError(f"codes {list(codes.shape)} {codes.dtype}, expected those of {self.name}")
        if tuple(scale.shape) != self.scale_shape(shape):
            expected = list(self.scale_shape(shape))
            raise ValueError(f"scale {list(scale.shape)}, expected {expected} for {list(shape)}")
        flat, wide = self._flat(codes), self._wide(scale)
        if not codes.is_meta:
            self._check(flat, wide, dtype)
        into = out.mT if out is not None and self.transposed else out
        if into is not None and (
            into.dtype != dtype or out is None or tuple(out.shape) != shape or not into.is_contiguous()
        ):
            raise ValueError(f"out is {list(into.shape)} {into.dtype}, expected {list(shape)} {dtype}, contiguous")
        made = values.decode(flat, wide, self.code, self.block, dtype, zero=self.zero, out=into)
        return made.mT if self.transposed else made

    def encode(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes, scale) with decode(codes, scale) nearest to weight; encode(decode(q, s), s) == (q, s), bit for bit.

        scale: one to use again in every block where it gives weight back exactly, such as the one that weight was
        decoded with; every other block gets a fresh one, with which |decode - w| is at most, s being the scale,

            e4m3   2^-4 |w| + 2^-10 s        (s the least power of two that fits)
            e2m1   |w| / 5 + s / 4           (s the least power of two that fits)
            int4   s / 2                     (s the least number of five bits that fits, under 17/16 max |w| / 7)

        and encode(decode(q, s)) == (q, s) without the scale too. e4m3 keeps NaN. Raises ValueError for an infinity,
        for NaN where codes have none, and for a shape that does not fit.
        """
        if not self.fits(tuple(weight.shape)):
            raise ValueError(f"{list(weight.shape)}, expected whole groups of {self.block[1]} columns")
        w = weight.mT if self.transposed else weight
        dtype = self.scales[0] if scale is None else scale.dtype
        if weight.is_meta or not weight.numel():
            spec = self.codes_spec(tuple(weight.shape))
            ones = torch.ones(self.scale_shape(tuple(weight.shape)), device=weight.device)
            return weight.new_empty(spec.shape, dtype=spec.dtype), values.as_scale(
                ones, dtype
            ) if scale is None else scale
        bad = w.isinf() if self.code == "e4m3" else ~w.isfinite()
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            none = "infinity" if self.code == "e4m3" else "NaN and no infinity"
            raise ValueError(f"{w[tuple(at)].item()} at {at}, expected finite values: {self.code} has no {none}")
        carried = None if scale is None else self._wide(scale)
        codes, used = blocks.quantise(self._whole(w), carried, self.code, self.block, dtype, zero=self.zero)
        used = used.reshape(self.scale_shape(tuple(weight.shape)))
        return self._stored(codes.view(*w.shape[:-1], -1)), used

    def nearest(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What the codes nearest to weight say under these scales, in its dtype; and the step from each to the next."""
        w, wide = self._whole(weight.mT if self.transposed else weight), self._wide(scale)
        codes = blocks.encode(w, wide, self.code, self.block, zero=self.zero)
        value = values.decode(codes, wide, self.code, self.block, weight.dtype, zero=self.zero)
        step = blocks.steps(value, wide, self.code, self.block, zero=self.zero)
        back = lambda t: t.view(weight.mT.shape).mT if self.transposed else t.view(weight.shape)
        return back(value), back(step)

    def _check(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        most = min(torch.finfo(torch.bfloat16).max, torch.finfo(dtype).max) / MOST[self.code]
        least, largest = values.bounds(scale, zero=self.zero)
        if least >= self.least(dtype) and largest <= most:
            return
        factor = values.as_number(scale, zero=self.zero)
        if not (least >= 0 and largest <= most):  # NaN compares false
            worst = factor.flatten()[~((factor >= 0) & (factor <= most)).flatten()][0].item()
            raise ValueError(f"a scale is {worst}, expected finite scales from 0 to {most:.4g}")
        small = factor < self.least(dtype)
        if bool(small.any()):
            ones = torch.where(small, 1.0, 0.0)
            probe = values.decode(codes, ones, self.code, self.block, torch.float32)
            if bool((probe != 0).any()):
                worst = factor[small].flatten()[0].item()
                kind = str(dtype).removeprefix("torch.")
                text = f"codes under a scale of {worst}, which decode in {kind} to nothing that leads back to them"
                raise ValueError(text)

    def _flat(self, codes: Tensor) -> Tensor:
        """Codes as `values` takes them: [.., R, C] e4m3, or [.., R, C / 2] bytes."""
        if self.code == "e4m3":
            return codes
        flat = codes.flatten(-2) if self.grouped else codes.contiguous()
        return flat.view(torch.uint8)

    def _stored(self, codes: Tensor) -> Tensor:
        made = codes.view(self.stored)
        return made.unflatten(-1, (-1, 16)) if self.grouped else made

    def _whole(self, weight: Tensor) -> Tensor:
        """A tensor of which each matrix has scales of its own: of one scale for all, one matrix."""
        return weight.reshape(-1, weight.shape[-1]) if self.rank == 0 else weight

    def _wide(self, scale: Tensor) -> Tensor:
        """The scale as one for each block."""
        return scale[..., None, None] if self.rank == 1 else scale
