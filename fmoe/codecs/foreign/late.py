"""w = (value(code) * scale) * second: where the scale of scales comes after the scale, each product rounded in fp32."""

import torch
from torch import Tensor

from fmoe.codecs import values
from fmoe.codecs.values import Block


def twice(
    codes: Tensor,
    scale: Tensor,
    second: Tensor,
    code: str,
    block: Block,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """[.., R, C] in dtype: a matrix at a time, so that fp32 is held of one. second: a number for each, or one.

    >>> codes, scale = torch.full((2, 1, 1), 0x21, dtype=torch.uint8), torch.full((2, 1, 1), 0.5)
    >>> twice(codes, scale, torch.tensor([1.0, 3.0]), "e2m1", (1, 2), torch.float32)[1]  # 0.5 and 1
    tensor([[0.7500, 1.5000]])
    """
    shape = (*codes.shape[:-1], codes.shape[-1] * values.PER_BYTE[code])
    made = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    if codes.is_meta or not made.numel():
        return made
    each = second.float().reshape(-1).expand(made[..., 0, 0].numel())
    matrices = zip(made.view(-1, *shape[-2:]), codes.flatten(0, -3) if codes.ndim > 2 else codes[None], strict=True)
    scales = scale.flatten(0, -3) if scale.ndim > 2 else scale[None]
    for e, (into, mine) in enumerate(matrices):
        into.copy_(values.decode(mine, scales[e], code, block, torch.float32).mul_(each[e]))
    return made
