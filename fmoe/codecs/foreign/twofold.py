"""Scales of scales: NVFP4's blocks have a scale in e4m3 each, and the tensor one in fp32 for all of them."""

from dataclasses import replace

import torch
from torch import Tensor

from fmoe.codecs import blocks, values
from fmoe.codecs.format import Format
from fmoe.codecs.values import E4M3

RANGE = values.MOST["e2m1"] * values.MOST["e4m3"]  # the largest number under a whole scale of 1


def encode(
    f: Format, weight: Tensor, scale: Tensor | None = None, second: Tensor | None = None, third: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, second) nearest to weight [R, C]: the given ones where they give weight back, else fresh ones.

    second is max |w| / 2688 (or, where it divides, one over that; where third divides it, that times third), and a
    block's scale the e4m3 nearest to its largest number / 6 / second, from 2^-9 to 448, and 1 where all are 0.
    |decode - w| is at most |w| / 4 + s / 4 for s the block's whole scale. Of a stack [E, R, C], matrices that did not
    change keep their codes. Raises ValueError for what is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("NaN or an infinity, expected finite values: e2m1 has neither")
    if f.across:
        codes, made, second = encode(f.along, weight.mT, None if scale is None else scale.mT, second, third)
        return codes.mT.contiguous(), made.mT.contiguous(), second
    if f.stack:
        return _stack(f, weight, scale, second, third)
    if scale is not None and second is not None:
        both = f.folded(scale, second)
        codes = blocks.encode(weight, both, f.code, f.block)
        if torch.equal(values.decode(codes, both, f.code, f.block, weight.dtype), weight):
            return codes, scale, second
    whole = _largest(weight) / RANGE
    second = (1 / whole if f.divides else whole).view(1, 1)
    codes, made = _under(f, weight, whole, second)
    return codes, made, second


def third(second: Tensor) -> Tensor:
    """A fresh one: `second` is then the largest number itself."""
    return torch.tensor(RANGE, device=second.device)


def _largest(weight: Tensor) -> Tensor:
    return weight.float().abs().amax().clamp(min=2.0**-100)


def _under(f: Format, weight: Tensor, whole: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a matrix under a scale of scales."""
    most = blocks.blocks_of(weight, f.block).abs().amax(dim=(-3, -1))
    made = (most / 6 / whole).clamp(2.0**-9, 448).to(E4M3)
    made = torch.where(most == 0, torch.ones_like(most).to(E4M3).float(), made.float()).to(E4M3)
    return blocks.encode(weight, f.folded(made, second), f.code, f.block), made


def _stack(
    f: Format, weight: Tensor, scale: Tensor | None, second: Tensor | None, under: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix by matrix, under one scale of scales or each under its own."""
    one, times = replace(f, stack=False), RANGE if under is None and f.third else under
    whole = lambda s: s.float() if times is None else s.float() / times
    each = f.lone != "()"
    if scale is None or second is None or not each and float(_largest(weight)) > float(whole(second)) * RANGE * 1.01:
        largest = torch.stack([_largest(w) for w in weight]) if len(weight) else weight.new_ones(0).float()
        scale, second = None, largest if each else largest.amax()
        second = second / RANGE * (1.0 if times is None else times)
    seconds, codes, scales = second.clone(), list[Tensor](), list[Tensor]()
    for e, w in enumerate(weight):
        mine = seconds[e] if each else seconds
        if scale is not None:
            found = blocks.encode(w, one.folded(scale[e], whole(mine)), f.code, f.block)
            if torch.equal(one.decode(found, scale[e], w.dtype, second=whole(mine)), w):
                codes, scales = [*codes, found], [*scales, scale[e]]
                continue
            if each:
                mine = (_largest(w) / RANGE * (1.0 if times is None else times)).to(second.dtype)
                seconds[e] = mine
        found, fresh = _under(one, w, whole(mine), whole(mine))
        codes, scales = [*codes, found], [*scales, fresh]
    return torch.stack(codes), torch.stack(scales), seconds
