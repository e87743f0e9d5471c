"""The eager twins of products by e4m3 and by other codes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe_kernels.host.check import ENDS, WIDE, check
from fmoe_kernels.host.codes import KINDS, PACKED, check_code, check_scales
from fmoe_kernels.reference.layer import gmm
from fmoe_kernels.reference.routed import check_ends


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s), s[n, c] the largest of |x[n, 128 c : 128 c + 128]| over 448 (1 where all are 0) and q = x / s in e4m3.

    x [N, K] -> q [N, K] e4m3, s [N, ceil(K / 128)] fp32. NaN stays NaN and counts for no scale.

    >>> q, s = quantize_rows(torch.tensor([[448.0, -1.0], [0.0, 0.0]]))
    >>> q.tolist(), s.tolist()
    ([[448.0, -1.0], [0.0, 0.0]], [[1.0], [1.0]])
    """
    check("reference.quantize_rows", {"x": (x, "N K", WIDE)})
    K = x.shape[1]
    groups = F.pad(x.float(), (0, -K % 128)).unflatten(1, (-1, 128))
    most = groups.nan_to_num(nan=0.0).abs().amax(2)
    s = torch.where(most > 0, most / 448, 1.0)
    return (groups / s[..., None]).flatten(1)[:, :K].to(torch.float8_e4m3fn), s


def gmm_fp8(q: Tensor, s: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = (q[n] * s[n]) @ (w[e] * w_scale[e]) in fp32, each scale for 128 columns of q, or 128x128 of w.

    q [N, K] and w [E, K, M] e4m3, s [N, ceil(K / 128)], w_scale [E, ceil(K / 128), ceil(M / 128)] -> [N, M] fp32.
    """
    who, e4m3 = "reference.gmm_fp8", (torch.float8_e4m3fn,)
    given = {"q": (q, "N K", e4m3), "w": (w, "E K M", e4m3), "offsets": (offsets, "E", ENDS)}
    sizes = check(who, given)
    sizes |= {"k": -(-sizes["K"] // 128), "m": -(-sizes["M"] // 128)}
    check(who, {"q": given["q"], "s": (s, "N k", WIDE), "w_scale": (w_scale, "E k m", WIDE)}, **sizes)
    check_ends(who, offsets, len(q))
    spread = lambda t, dim, size: t.float().repeat_interleave(128, dim).narrow(dim, 0, size)
    wide = w.float() * spread(spread(w_scale, 1, w.shape[1]), 2, w.shape[2])
    return gmm(q.float() * spread(s, 1, q.shape[1]), wide, offsets)


def decode(
    words: Tensor, scale: Tensor, second: Tensor | None, code: str, block: tuple[int, int], *,
    divides: bool = False, late: bool = False,
) -> Tensor:  # fmt: skip
    """The matrices [E, K, N] in fp32 that `programs.codes.Coded` holds: value(code) * scale, block by block.

    divides: by second. late: second multiplies last.
    """
    who = "reference.decode"
    check_code(who, code, block, second, divides=divides, late=late)
    given = {"words": (words, "E k M", (KINDS[code],))}
    sizes, packed = check(who, given), PACKED[code]
    check_scales(who, given, scale, second, code, block, sizes | {"K": sizes["k"] * packed})
    bits = 8 if code == "int8" else 4
    places = bits * torch.arange(packed, device=words.device).view(1, 1, -1, 1)
    nibbles = (words[:, :, None].int() >> places & 2**bits - 1).flatten(1, 2)
    if code == "e4m3":
        value = words.view(torch.float8_e4m3fn).float()
    elif code == "e2m1":
        half = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], device=words.device)
        value = torch.cat([half, -half])[nibbles]
    else:
        value = (words.int() ^ 128 if code == "signed" else nibbles).float()
        point: Tensor | int = 8 if code == "int4" else 128
        if second is not None:
            point, second = _spread(second, block, value), None
        value = value - point
    if second is not None and late:
        return value * _spread(scale.view(torch.float8_e4m3fn).float(), block, value) * second
    if second is not None:
        whole = scale.view(torch.float8_e4m3fn).float()
        factor = whole / second if divides else whole * second
    elif scale.dtype == torch.uint8:
        factor = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
        factor = factor.masked_fill(scale == 255, torch.nan)
    else:
        factor = scale.float()
    return value * _spread(factor, block, value)


def _spread(each: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    for axis, side in zip((1, 2), block, strict=True):
        each = each.repeat_interleave(side or like.shape[axis], axis).narrow(axis, 0, like.shape[axis])
    return each
