"""w = (code - zero point) * scale: what GPTQ and AWQ have calibrated, and integers with zero points.

Scales and zero points come from calibration, so that there is no fresh encoding: numbers go back under those that
they were decoded with, to the nearest code.
"""

import torch
from torch import Tensor

from fmoe.codecs import values
from fmoe.codecs.values import Block

BITS = {"int4": 4, "int8": 8}


def decode(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    code: str,
    block: Block,
    dtype: torch.dtype,
    *,
    least: float = 0.0,
    order: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """w[r, c] = (codes[r, c] - zero[r, g]) * scale[r, g] in fp32, rounded to dtype, g = c // C.

    codes: bytes [R, C bits / 8]. order [C]: g of each column instead. Raises ValueError for a scale that is NaN,
    infinite or too large, and for codes other than the zero point under one below least.

    >>> codes = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)  # 1 2 3 4
    >>> decode(codes, torch.tensor([[0.5, 2]]), torch.tensor([[1, 3]]), "int4", (1, 2), torch.float32)
    tensor([[0.0000, 0.5000, 0.0000, 2.0000]])
    """
    rows, columns = codes.shape[0], codes.shape[1] * values.PER_BYTE[code]
    made = torch.empty(rows, columns, dtype=dtype, device=codes.device) if out is None else out
    if codes.is_meta or not rows * columns:
        return made
    most = min(torch.finfo(torch.bfloat16).max, torch.finfo(dtype).max) / 2 ** BITS[code]
    sizes = scale.float().abs().flatten()
    if bool((bad := ~(sizes <= most)).any()):  # NaN compares false
        raise ValueError(f"a scale is {scale.flatten()[bad][0].item()}, expected finite scales of at most {most:.4g}")
    group = _groups(columns, block, order, codes.device)
    one, half = torch.ones(1, 1, device=codes.device), 2 ** (BITS[code] - 1)
    step = max(1, 2**19 // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        x = values.decode(codes[part], one, code, (0, 0), torch.float32).add_(half)
        factor = scale[part].float()
        x.sub_(zero[part].float()[:, group])
        if bool((factor.abs() < least).any()) and bool(x[factor.abs()[:, group] < least].any()):
            kind = str(dtype).removeprefix("torch.")
            found = f"codes under a scale of {factor[factor.abs() < least][0].item()}"
            raise ValueError(f"{found}, which decode in {kind} to nothing that leads back to them")
        made[part] = x.mul_(factor[:, group])
    return made


def encode(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    code: str,
    block: Block,
    *,
    order: Tensor | None = None,
    strict: bool = True,
) -> Tensor:
    """The codes nearest to weight under these scales and zero points, as bytes: encode(decode(q)) == q.

    Raises ValueError for a number that is not finite, or that lies more than half a step beyond the last code, unless
    strict is False.
    """
    top, rows, columns = 2 ** BITS[code] - 1, *weight.shape
    if weight.is_meta:
        return torch.empty(rows, columns // values.PER_BYTE[code], dtype=torch.uint8, device="meta")
    group = _groups(columns, block, order, weight.device)
    parts: list[Tensor] = []
    step = max(1, 2**19 // max(1, columns))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        factor, w = scale[part].float()[:, group], weight[part].float()
        x = torch.where((factor == 0) & (w == 0), 0.0, w / factor) + zero[part].float()[:, group]
        if strict and bool((bad := ~((x >= -0.5) & (x <= top + 0.5))).any()):  # NaN compares false
            r, c = bad.nonzero()[0].tolist()
            reach = "what its scale and zero point reach, and no others are made: they come from calibration"
            raise ValueError(f"{w[r, c].item()} at [{first + r}, {c}], expected {reach}. Fix: quantization=False")
        parts.append(x.round().clamp(0, top).to(torch.uint8))
    found = torch.cat(parts) if parts else torch.empty(0, columns, dtype=torch.uint8)
    return found if code == "int8" else found[:, 0::2] | found[:, 1::2] << 4


def _groups(columns: int, block: Block, order: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(columns, device=device) // (block[1] or columns) if order is None else order.long()


def is_plain(order: Tensor, group: int) -> bool:
    """Whether columns are in whole groups, one after the other.

    >>> is_plain(torch.tensor([0, 0, 1, 1]), 2), is_plain(torch.tensor([0, 1, 0, 1]), 2)
    (True, False)
    """
    return order.is_meta or torch.equal(order.long(), torch.arange(len(order), device=order.device) // group)
