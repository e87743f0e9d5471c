"""FP8 in 128x128 blocks: `X.weight` in e4m3 beside `X.weight_scale_inv`, one scale to multiply by for each block.

Decoding keeps the scale beside the decoded weight, so that encoding gives back the very bytes that were read: a block
whose values are unchanged takes its scale again, any other gets a new one (a power of two, so that
`encode(decode(q)) == q` holds for it too, and decoding to bf16 is exact). Ragged edges have a scale of their own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from fmoe.claims import some
from fmoe.codecs import Change, CodecPlan
from fmoe.grouping import Specs, Window
from fmoe.names import Names
from fmoe.types import AdapterError, Problem, TensorSpec

E4M3 = torch.float8_e4m3fn
SUFFIX = "_scale_inv"
_MOST = 448.0  # the largest e4m3 value; what rounds to it lies below 464


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, block: int = 128) -> Tensor:
    """w[r, c] = float(weight[r, c]) * float(scale[r // block, c // block]), rounded once to dtype.

    weight [R, C] e4m3, scale [ceil(R / block), ceil(C / block)]. Raises ValueError for another shape of scale.
    Source: DeepSeek-V3's `weight_scale_inv`.

    >>> dequantize(torch.ones(2, 3).to(E4M3), torch.tensor([[0.5]]), torch.float32)
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    if tuple(scale.shape) != grid(weight.shape, block):
        raise ValueError(
            f"scale {list(scale.shape)}, expected {list(grid(weight.shape, block))} for {list(weight.shape)}"
        )
    return _scaled(_blocks(weight, block), scale, weight.shape).to(dtype)


def quantize(weight: Tensor, scale: Tensor | None = None, block: int = 128) -> tuple[Tensor, Tensor]:
    """(q, s) with dequantize(q, s) nearest to weight: |q * s - w| <= 2^-4 |w| + 2^-10 s in every block.

    weight [R, C] floating; scale: one to use again in every block where it gives weight back exactly, such as the one
    that weight was decoded with. New scales are the least powers of two that fit, in fp32. Returns (q e4m3, s).
    NaN stays NaN and counts for no scale. Raises ValueError for an infinity: e4m3 has none.

    >>> q, s = quantize(torch.tensor([[1.0, -3.0]]))
    >>> dequantize(q, s, torch.float32), s
    (tensor([[ 1., -3.]]), tensor([[0.0078]]))
    """
    if not weight.is_meta and bool((infinite := weight.isinf()).any()):
        at = infinite.nonzero()[0].tolist()
        raise ValueError(f"{weight[tuple(at)].item()} at {at}, expected finite values: e4m3 has no infinity")
    blocks = _blocks(weight, block)
    if scale is not None:
        q = _rounded(blocks, scale, weight.shape)
        again = _scaled(_blocks(q, block), scale, weight.shape).to(weight.dtype)
        same = (again == weight) | (again.isnan() & weight.isnan())
        if weight.is_meta or bool(same.all()):
            return q, scale
    most = blocks.nan_to_num(nan=0.0).abs().amax(dim=(1, 3))
    _, exponent = torch.frexp(most / (_MOST + 16))
    used = torch.ldexp(torch.ones_like(most), exponent.clamp(min=-126))
    used = torch.where(most <= (_MOST + 16) * used / 2, used / 2, used)
    if scale is not None:
        used = torch.where(_blocks(same, block, fill=1.0).amin(dim=(1, 3)) == 1, scale.float(), used).to(scale.dtype)
    return _rounded(blocks, used, weight.shape), used


def _eight_bits(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1 and dtype != torch.float8_e8m0fnu


def grid(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """How many blocks cover each dimension."""
    return tuple(-(-n // block) for n in shape)


def _blocks(x: Tensor, block: int, fill: float = 0.0) -> Tensor:
    rows, columns = (-n % block for n in x.shape)
    x = x.float()
    x = pad(x, (0, columns, 0, rows), value=fill) if rows or columns else x
    return rearrange(x, "(R r) (C c) -> R r C c", r=block, c=block)


def _unblocked(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rearrange(x, "R r C c -> (R r) (C c)")[: shape[0], : shape[1]]


def _scaled(blocks: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _unblocked(blocks * scale.float()[:, None, :, None], shape)


def _rounded(blocks: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    step = scale.float()[:, None, :, None]
    q = torch.where(step == 0, 0.0, blocks / step).clamp(-_MOST, _MOST)
    return _unblocked(q, shape).to(E4M3).contiguous()


@dataclass(frozen=True)
class BlockFP8:
    """The stage that decodes every `X` in e4m3 with its `X_scale_inv`, and encodes it back.

    dtype: what weights decode to. pattern: a regex for the names that a fresh export quantises. quantization: None
    encodes the weights that carry scales, True those and all that match the pattern, False none (leaving scales out).
    declared: the config or the names say that the checkpoint is in FP8; where they do not, nothing is lost.
    """

    dtype: torch.dtype
    pattern: str | None
    block: int = 128
    quantization: bool | None = None
    declared: bool = False
    flipped: bool = False

    @property
    def lossless(self) -> bool:
        return not (self.declared or self.quantization)

    @property
    def inverse(self) -> "BlockFP8":
        return replace(self, flipped=not self.flipped)

    def choose(self, choices: Mapping[str, Any]) -> "BlockFP8":
        return replace(self, quantization=choices.get("quantization", self.quantization))

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {}

    def axes(self) -> frozenset[str]:
        return frozenset()

    def resolve(self, names: Names, *, default: bool) -> "BlockFP8":
        return replace(self, declared=any(template.endswith(SUFFIX) for template in names.rows))

    def rename(self, names: Names) -> list[str]:
        return names.names

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        scales = {n: n.removesuffix(SUFFIX) for n in specs if n.endswith(SUFFIX)}
        unfit = {s: p for s, w in scales.items() for p in self._unfit(s, w, specs)}
        problems = list(unfit.values())
        if not self.flipped:
            bare = [n for n, spec in specs.items() if _eight_bits(spec.dtype) and n + SUFFIX not in specs]
            problems += [self._bare(n, specs[n]) for n in bare]
        if scales and (others := window.keys() - {"e"}):
            problems.append(Problem(f"{', '.join(others)}: FP8 blocks can only be cut by expert", tuple(scales)[:8]))
        scales = {s: w for s, w in scales.items() if s not in unfit}
        encoding = self._encoding(specs, set(scales.values())) if self.flipped else None
        plan = encoding or self._decoding(specs, scales)
        if problems:
            raise AdapterError(problems, rest=plan)
        return plan

    def _bare(self, name: str, spec: TensorSpec) -> Problem:
        return Problem(f"{name!r} is {spec.dtype} and its scale {name + SUFFIX!r} is missing", (name, name + SUFFIX))

    def _unfit(self, scale: str, weight: str, specs: Specs) -> list[Problem]:
        if weight not in specs:
            return [Problem(f"{scale!r} is the scale of {weight!r}, which is missing", (scale, weight))]
        spec, expected = specs[weight], grid(specs[weight].shape, self.block)
        if not self.flipped and spec.dtype != E4M3:
            return [Problem(f"{scale!r} stands beside {weight!r} in {spec.dtype}, expected {E4M3}", (scale, weight))]
        if len(spec.shape) != 2 or specs[scale].shape != expected:
            text = f"{scale!r} is {list(specs[scale].shape)}, expected {list(expected)}: a scale for each "
            return [Problem(f"{text}{self.block}x{self.block} block of {weight!r} {list(spec.shape)}", (scale, weight))]
        return []

    def _decoding(self, specs: Specs, scales: Mapping[str, str]) -> CodecPlan:
        def decode(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
            weight, scale = params
            if not params[scale].is_meta and not bool(params[scale].float().isfinite().all()):
                raise AdapterError([Problem(f"{scale!r} holds NaN or an infinity, expected finite scales", (scale,))])
            return {weight: dequantize(params[weight], params[scale], self.dtype, self.block), scale: params[scale]}

        targets = dict(specs) | {w: TensorSpec(specs[w].shape, self.dtype) for w in scales.values()}
        changes: list[tuple[list[str], list[str], Change]] = []
        for scale, weight in scales.items():
            pair = [weight, scale]
            changes.append((pair, pair, decode))
        return CodecPlan(targets, tuple(changes), str(self), block=self.block)

    def _encoding(self, specs: Specs, carried: set[str]) -> CodecPlan:
        if self.quantization is False:
            kept = {n: s for n, s in specs.items() if not n.endswith(SUFFIX)}
            return CodecPlan(kept, (), str(self))

        def encode(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
            weight = next(iter(params))
            try:
                q, s = quantize(params[weight], params.get(weight + SUFFIX), self.block)
            except ValueError as error:
                raise AdapterError([Problem(f"{weight!r}: {error}", (weight,))]) from None
            return {weight: q, weight + SUFFIX: s}

        if self.quantization and self.pattern is None:
            raise AdapterError("quantization=True: the family has no FP8 form; pass quantization=None")
        fused = tuple(n for n, s in specs.items() if "experts" in n.split(".") and len(s.shape) == 3)
        if self.quantization and fused:
            text = f"{some(fused)}: fused experts have no FP8 form: choose layout='per_expert' to quantise"
            raise AdapterError([Problem(text, fused)])
        chosen = sorted(carried | ({n for n, s in specs.items() if self._mine(n, s)} if self.quantization else set()))
        targets = dict(specs)
        for weight in chosen:
            dtype = specs[weight + SUFFIX].dtype if weight in carried else torch.float32
            targets[weight] = TensorSpec(specs[weight].shape, E4M3)
            targets[weight + SUFFIX] = TensorSpec(grid(specs[weight].shape, self.block), dtype)
        both = lambda w: [w, w + SUFFIX]
        changes = tuple((both(w) if w in carried else [w], both(w), encode) for w in chosen)
        return CodecPlan(targets, changes, str(self), block=self.block)

    def _mine(self, name: str, spec: TensorSpec) -> bool:
        matches = self.pattern is not None and re.fullmatch(self.pattern, name)
        return len(spec.shape) == 2 and spec.dtype.is_floating_point and bool(matches)

    def __str__(self) -> str:
        what = f"e4m3 with {SUFFIX} per {self.block}x{self.block} block"
        return (
            f"encode {what}, where scales are" if self.flipped else f"decode {what} to {self.dtype}, where scales are"
        )
