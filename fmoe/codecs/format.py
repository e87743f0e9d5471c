"""What a format is: its numbers, decoded and encoded; `stored.py` has its names and shapes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmoe.codecs import blocks, values
from fmoe.codecs.foreign import affine
from fmoe.codecs.foreign.late import twice
from fmoe.codecs.stored import FLOATS, SHAPES, Stored
from fmoe.codecs.values import MOST
from fmoe.types import TensorSpec

__all__ = ["FLOATS", "SHAPES", "Format"]


@dataclass(frozen=True, kw_only=True)
class Format(Stored):
    """w = value(code) * scale, for every number of a tensor [.., R, C] and the one scale of its block."""

    def decode(
        self,
        codes: Tensor,
        scale: Tensor,
        dtype: torch.dtype = torch.bfloat16,
        *,
        second: Tensor | None = None,
        order: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """value(code) * scale in fp32, rounded to dtype (exact in bf16 where scales are powers of two).

        second: the scale of scales, or zero points. order: with these, the group of each column, where groups are not
        of neighbours. out: storage to decode into, of the result's shape and dtype, contiguous as the codes lie.
        Raises ValueError for another shape or dtype, for a scale that is NaN, infinite, negative or too large for
        dtype, and for codes other than 0 under a scale so small (or 0) that they could not be told from the result.
        """
        if self.shards > 1 and out is None:
            return self._alone().decode(self._sharded(codes), self._sharded(scale), dtype).flatten(0, 1)
        if self.across:
            made = self.along.decode(codes.mT, scale.mT, dtype, second=second).mT
            return made if out is None else out.copy_(made)
        shape = self.decoded(TensorSpec(tuple(codes.shape), codes.dtype))
        first = scale
        scale = scale if second is None or self.zeros else self.folded(scale, second)
        if shape is None:
            raise ValueError(f"codes {list(codes.shape)} {codes.dtype}, expected those of {self.name}")
        if tuple(scale.shape) != self.scale_shape(shape):
            expected = list(self.scale_shape(shape))
            raise ValueError(f"scale {list(scale.shape)}, expected {expected} for {list(shape)}")
        flat, wide = self._flat(codes), self._wide(scale)
        if not codes.is_meta and not self.zeros:
            self._check(flat, wide, dtype)
        into = out.mT if out is not None and self.transposed else out
        if into is not None and (
            into.dtype != dtype or out is None or tuple(out.shape) != shape or not into.is_contiguous()
        ):
            raise ValueError(f"out is {list(into.shape)} {into.dtype}, expected {list(shape)} {dtype}, contiguous")
        if self.zeros:
            if second is None or second.shape != scale.shape:
                raise ValueError(f"zero points {None if second is None else list(second.shape)}, expected one a scale")
            least = self.least(dtype)
            return affine.decode(flat, scale, second, self.code, self.block, dtype, least=least, order=order, out=out)
        if self.late and second is not None:
            return twice(flat, first, second, self.code, self.block, dtype, out=out)
        made = values.decode(flat, wide, self.code, self.block, dtype, out=into)
        return made.mT if self.transposed else made

    def folded(self, scale: Tensor, second: Tensor) -> Tensor:
        """Both scales as one, in fp32."""
        second = second.float().view(-1, 1, 1) if self.stack and second.ndim else second.float()
        return scale.float() / second if self.divides else scale.float() * second

    @property
    def along(self) -> "Format":
        """The format of the transposed matrices, where this one is `across`."""
        return replace(self, across=False, block=self.block[::-1]) if self.across else self

    def encode(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(codes, scale) with decode(codes, scale) nearest to weight; encode(decode(q, s), s) == (q, s), bit for bit.

        scale: one to use again in every block where it gives weight back exactly, such as the one that weight was
        decoded with; every other block gets a fresh one, with which |decode - w| is at most, s being the scale,

            e4m3   2^-4 |w| + 2^-10 s        (s amax / 448 in seven bits; of other dtypes than float32 and bfloat16
                                              the least power of two that fits)
            e2m1   |w| / 5 + s / 4           (s the least power of two that fits)
            int4   s / 2                     (s the least number of five bits that fits, under 17/16 max |w| / 7)

        and encode(decode(q, s)) == (q, s) without the scale too. e4m3 keeps NaN. Raises ValueError for an infinity,
        for NaN where codes have none, and for a shape that does not fit.
        """
        if not self.fits(tuple(weight.shape)):
            raise ValueError(f"{list(weight.shape)}, expected whole groups of {self.block[1]} columns")
        if self.shards > 1:
            given = None if scale is None else self._sharded(scale)
            codes, used = self._alone().encode(self._sharded(weight), given)
            return codes.flatten(0, 1), used.flatten(0, 1)
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
        codes, used = blocks.quantise(self._whole(w), carried, self.code, self.block, dtype)
        used = used.reshape(self.scale_shape(tuple(weight.shape)))
        return self._stored(codes.view(*w.shape[:-1], -1)), used

    def under(
        self, weight: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None = None, *, strict: bool = True
    ) -> Tensor:
        """The codes nearest to weight under scales and zero points. strict: ValueError for what is out of reach."""
        found = affine.encode(weight, scale, zero, self.code, self.block, order=order, strict=strict)
        return self._stored(found)

    def nearest(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What the codes nearest to weight say under these scales, in its dtype; and the step from each to the next."""
        if self.shards > 1:
            value, step = self._alone().nearest(self._sharded(weight), self._sharded(scale))
            return value.flatten(0, 1), step.flatten(0, 1)
        w, wide = self._whole(weight.mT if self.transposed else weight), self._wide(scale)
        codes = blocks.encode(w, wide, self.code, self.block)
        value = values.decode(codes, wide, self.code, self.block, weight.dtype)
        step = blocks.steps(value, wide, self.code, self.block)
        back = lambda t: t.view(weight.mT.shape).mT if self.transposed else t.view(weight.shape)
        return back(value), back(step)

    def _alone(self) -> "Format":
        return replace(self, shards=1)

    def _sharded(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (self.shards, -1))

    def _check(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        most = min(torch.finfo(torch.bfloat16).max, torch.finfo(dtype).max) / MOST[self.code]
        least, largest = values.bounds(scale)
        if least >= self.least(dtype) and largest <= most:
            return
        factor = values.as_number(scale)
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
        if self.stored == torch.int8 and self.code == "int8":  # two's complement, as an offset of 128
            return codes.view(torch.uint8) ^ 128
        flat = codes.flatten(-2) if self.grouped else codes.contiguous()
        return flat.view(torch.uint8)

    def _stored(self, codes: Tensor) -> Tensor:
        if self.stored == torch.int8 and self.code == "int8":
            return (codes ^ 128).view(torch.int8)
        made = codes.view(self.stored)
        return made.unflatten(-1, (-1, 16)) if self.grouped else made

    def _whole(self, weight: Tensor) -> Tensor:
        """A tensor of which each matrix has scales of its own: of one scale for all, one matrix."""
        return weight.reshape(-1, weight.shape[-1]) if self.rank == 0 else weight

    def _wide(self, scale: Tensor) -> Tensor:
        """The scale as one for each block."""
        return scale[..., None, None] if self.rank == 1 else scale
