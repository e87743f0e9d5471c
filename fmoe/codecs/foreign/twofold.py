"""Scales of scales: NVFP4's blocks have a scale in e4m3 each, and the tensor one in fp32 for all of them."""

import torch
from torch import Tensor

from fmoe.codecs import blocks, values
from fmoe.codecs.format import Format
from fmoe.codecs.values import E4M3


def encode(
    f: Format, weight: Tensor, scale: Tensor | None = None, second: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, second) nearest to weight [R, C]: the given ones where they give weight back, else fresh ones.

    second is max |w| / 2688 (or, where it divides, one over that), and a block's scale the e4m3 nearest to its largest
    number / 6 / second, from 2^-9 to 448, and 1 where all are 0. |decode - w| is at most |w| / 4 + s / 4 for s the
    block's whole scale. Raises ValueError for what is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("NaN or an infinity, expected finite values: e2m1 has neither")
    if scale is not None and second is not None:
        both = f.folded(scale, second)
        codes = blocks.encode(weight, both, f.code, f.block)
        if torch.equal(values.decode(codes, both, f.code, f.block, weight.dtype), weight):
            return codes, scale, second
    most = blocks.blocks_of(weight, f.block).abs().amax(dim=(-3, -1))
    largest = most.amax().clamp(min=2.0**-100)
    whole = largest / (values.MOST["e2m1"] * values.MOST["e4m3"])
    made = (most / 6 / whole).clamp(2.0**-9, 448).to(E4M3)
    made = torch.where(most == 0, torch.ones_like(most).to(E4M3).float(), made.float()).to(E4M3)
    second = (1 / whole if f.divides else whole).view(1, 1)
    return blocks.encode(weight, f.folded(made, second), f.code, f.block), made, second
