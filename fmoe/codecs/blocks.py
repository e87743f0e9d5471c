"""Numbers as codes and scales: whole blocks at a time, nearest, ties to even."""

import torch
from torch import Tensor

from fmoe.codecs.values import E4M3, E8M0, MOST, PER_BYTE, Block, as_number, as_scale, decode, grid

_PART = 2**19  # numbers encoded at a time, if a block is no larger
_RANGE = (2.0**-119, 72 * 2.0**113)  # of fresh e4m3 scales; 448 times the largest is a number of bf16


def blocks_of(x: Tensor, block: Block, fill: float = 0.0) -> Tensor:
    """[.., R, C] -> [.., R / r, r, C / c, c] in fp32 (of booleans, booleans), padded to whole blocks."""
    rows, columns = x.shape[-2:]
    r, c = block[0] or rows, block[1] or columns
    x = x if x.dtype == torch.bool else x.float()
    if rows % r or columns % c:
        x = torch.nn.functional.pad(x, (0, -columns % c, 0, -rows % r), value=fill)
    return x.unflatten(-1, (-1, c)).unflatten(-3, (-1, r))


def unblocked(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]]


def encode(weight: Tensor, scale: Tensor, code: str, block: Block) -> Tensor:
    """The codes nearest to weight under these scales, ties to even: e4m3, or 4-bit codes in pairs, uint8."""
    step = as_number(scale.expand(grid(weight.shape, block)))[..., :, None, :, None]
    x = blocks_of(weight, block)
    none = step == 0
    x = torch.where(none, x.mul(0.0), x / step) if bool(none.any()) else x / step
    x = unblocked(x, weight.shape)
    if code == "e4m3":
        found = x.clamp(-MOST[code], MOST[code]).to(E4M3).contiguous()
        missing = weight.isnan()
        if bool(missing.any()):
            nan = weight.signbit().to(torch.uint8) << 7 | 127
            found = torch.where(missing, nan, found.view(torch.uint8)).view(E4M3)
        return found
    if code == "int8":
        return x.round().clamp(-128, 127).add(128).to(torch.uint8)
    if code == "int4":
        found = x.round().clamp(-8, 7).add(8).to(torch.uint8)
    else:
        a, found = x.abs(), torch.zeros_like(x, dtype=torch.uint8)
        for i, edge in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
            found += a >= edge if i % 2 else a > edge
        found |= x.signbit().to(torch.uint8) << 3
    return found[..., 0::2] | found[..., 1::2] << 4


def steps(value: Tensor, scale: Tensor, code: str, block: Block) -> Tensor:
    """How far the next code's value is from each of these values, under their scales."""
    factor = as_number(scale.expand(grid(value.shape, block)))[..., :, None, :, None]
    x = blocks_of(value, block)
    at = torch.where(factor == 0, 0.0, x.abs() / factor)
    if code == "e4m3":
        step = torch.exp2(torch.frexp(at.clamp(min=2.0**-6)).exponent.float() - 4)
    elif code == "e2m1":
        step = torch.where(at >= 4, 2.0, torch.where(at >= 2, 1.0, 0.5))
    else:
        step = torch.ones_like(at)
    return unblocked(step * factor, value.shape)


def quantise(
    weight: Tensor, scale: Tensor | None, code: str, block: Block, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes, and a scale [.., R / r, C / c]: the given one in every block where it gives weight back, else a fresh one.

    Block after block in parts that take little memory. Raises ValueError where dtype cannot hold a scale.
    """
    *lead, rows, columns = weight.shape
    side = block[0] or rows
    sizes = (1, -1, columns) if rows % side == 0 and block[0] else (-1, rows, columns)
    matrices = weight.reshape(sizes)
    full = grid(tuple(weight.shape), block)
    held = None if scale is None else scale.expand(full).reshape(len(matrices), -1, full[-1])
    codes = torch.empty(
        (*matrices.shape[:2], columns // PER_BYTE[code]),
        dtype=E4M3 if code == "e4m3" else torch.uint8,
        device=weight.device,
    )
    used = torch.empty((len(matrices), -(-matrices.shape[1] // side), full[-1]), dtype=dtype, device=weight.device)
    step = max(1, _PART // (side * columns)) * side
    for m, matrix in enumerate(matrices):
        mine = None if held is None else held[m]
        if block[0] == 0:
            codes[m], used[m] = _whole(matrix, mine, code, block, dtype)
            continue
        for first in range(0, len(matrix), step):
            part, blocks = slice(first, first + step), slice(first // side, -(-(first + step) // side))
            some = None if mine is None else mine[blocks]
            codes[m, part], used[m, blocks] = _quantised(matrix[part], some, code, block, dtype)
    return codes.view(*lead, rows, -1), used.view(full)


def _whole(w: Tensor, scale: Tensor | None, code: str, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix of one scale: some rows after others, all with the given one, or all with a fresh one."""
    parts = w.split(max(1, _PART // w.shape[1]))
    if scale is not None:
        tried = [_quantised(part, scale, code, block, dtype) for part in parts]
        if all(torch.equal(as_number(used), as_number(scale)) for _, used in tried):
            return torch.cat([codes for codes, _ in tried]), scale
    most = torch.stack([part.float().nan_to_num(nan=0.0).abs().amax() for part in parts]).amax().view(1, 1)
    used = fresh_scale(most, code, block, dtype)
    if not bool(as_number(used).isfinite().all()):
        raise ValueError(f"{most.item()} is too large for a scale in {dtype}")
    return torch.cat([encode(part, used, code, block) for part in parts]), used


def _quantised(w: Tensor, scale: Tensor | None, code: str, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    same = None
    if scale is not None:
        codes = encode(w, scale, code, block)
        again = decode(codes, scale, code, block, w.dtype)
        same = (again == w) | (again.isnan() & w.isnan())
        if bool(same.all()):
            return codes, scale
    used = fresh_scale(w, code, block, dtype)
    if not bool(as_number(used).isfinite().all()):
        raise ValueError(f"{w.abs().max().item()} is too large for a scale in {dtype}")
    if scale is not None and same is not None:
        kept = blocks_of(same, block, fill=True).amin(dim=(-3, -1))
        bits = lambda s: s.view(torch.uint8) if s.dtype == E8M0 else s
        used = torch.where(kept, bits(scale), bits(used)).view(dtype)
    return encode(w, used, code, block), used


def fresh_scale(weight: Tensor, code: str, block: Block, dtype: torch.dtype) -> Tensor:
    """One scale for each block, such that what is decoded, in bf16 too, is encoded alike without it.

    int4, int8: the least number of five bits under which nothing is cut off. e4m3: amax / 448, rounded to seven bits,
    as 448 times the scale leads back to it; a scale that is not float32 or bfloat16, and every one of e2m1, is the
    least power of two under which nothing is cut off. NaN counts for none; of zeros alone it is 1.
    """
    most = blocks_of(weight, block).nan_to_num(nan=0.0).abs().amax(dim=(-3, -1))
    if code in ("int4", "int8"):
        mantissa, exponent = torch.frexp(most / (7 if code == "int4" else 127))
        made = torch.ldexp(mantissa.mul(32).ceil().div(32), exponent).to(dtype)
        return torch.where(made == 0, torch.ones((), dtype=dtype, device=made.device), made)
    if code == "e4m3" and dtype in (torch.float32, torch.bfloat16):
        mantissa, exponent = torch.frexp(most / MOST[code])
        made = torch.ldexp(mantissa.mul(128).round().div(128), exponent).clamp(*_RANGE)
        return torch.where(most == 0, 1.0, made).to(dtype)
    mantissa, exponent = torch.frexp(most)
    # the largest number becomes a code from half the largest on, so that what was decoded is encoded alike
    places, within = (9, mantissa <= 464 / 512) if code == "e4m3" else (3, mantissa < 7 / 8)
    exponent = torch.where(within, exponent - places, exponent - places + 1)
    exponent = exponent.clamp(min=-24 if dtype == torch.float16 else -119)
    made = torch.ldexp(torch.ones_like(most), torch.where(most == 0, 0, exponent))
    return as_scale(made, dtype)
