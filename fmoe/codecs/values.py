"""Codes and scales as numbers: decoding, in chunks that stay in a cache. `blocks.py` is the way back.

    e4m3   8 bits, 448 at most     int4   n - 8, two in a byte, the low nibble first
    int8   n - 128                 e2m1   4 bits, 6 at most, two in a byte, the low nibble first

A scale is a floating tensor, or bytes s (uint8, e8m0) that stand for 2^(s - 127). It belongs to a block of `block`
rows and columns of the last two dimensions (0: all of them); at ragged edges blocks are smaller.
"""

from functools import lru_cache

import torch
from torch import Tensor

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
MOST = {"e4m3": 448.0, "e2m1": 6.0, "int4": 8.0, "int8": 128.0}  # the largest magnitude of a code
PER_BYTE = {"e4m3": 1, "int8": 1, "e2m1": 2, "int4": 2}
LEAST = 2.0**-120  # below this, what a code decodes to may be no number of bf16 that leads back to it
_CHUNK = 2**17  # numbers that a thread decodes at a time
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Block = tuple[int, int]


def grid(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """How many blocks cover a tensor: one size for each dimension."""
    return (*shape[:-2], *(-(-n // (b or max(n, 1))) for n, b in zip(shape[-2:], block, strict=True)))


def exponential(scale: Tensor) -> bool:
    """Whether the scale's bytes are powers of two."""
    return scale.dtype in (torch.uint8, E8M0)


def as_number(scale: Tensor) -> Tensor:
    """The factors that a scale says, in fp32."""
    if not exponential(scale):
        return scale.float()
    places = scale.view(torch.uint8).int()
    return torch.index_select(_powers().to(scale.device), 0, places.flatten()).view(scale.shape)


def bounds(scale: Tensor) -> tuple[float, float]:
    """The least and the largest factor; NaN where one is."""
    if not scale.numel():
        return 0.0, 0.0
    told = scale.view(torch.uint8) if exponential(scale) else scale.float()
    least, most = (as_number(t) for t in told.aminmax())
    return float(least), float(most)


def as_scale(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_number`; powers of two only where the dtype's bytes are."""
    if dtype not in (torch.uint8, E8M0):
        return factor.to(dtype)
    _, exponent = torch.frexp(factor)
    s = torch.where(factor == 0, 0, exponent + 126).to(torch.uint8)
    s = torch.where(factor.isnan(), 255, s.int()).to(torch.uint8)
    return s.view(dtype)


def decode(
    codes: Tensor,
    scale: Tensor,
    code: str,
    block: Block,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """w[.., r, c] = value(codes[.., r, c]) * factor(scale[.., r // R, c // C]) in fp32, rounded to dtype.

    codes: e4m3, or two 4-bit codes a byte, [.., R, C / 2] uint8. scale: `grid` of them, or one that broadcasts to it.
    """
    shape = (*codes.shape[:-1], codes.shape[-1] * PER_BYTE[code])
    if codes.is_meta or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=codes.device)
    out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    rows, columns = shape[-2:]
    flat, into = codes.contiguous().view(torch.uint8).view(-1, codes.shape[-1]), out.view(-1, columns)
    spread = scale.expand(grid(shape, block)).reshape(-1, -(-columns // (block[1] or columns)))
    count, side = len(flat), block[0] or rows
    at = torch.arange(count, device=codes.device)
    which = at if side == 1 else at // rows * -(-rows // side) + at % rows // side
    packed = code == "e2m1" and exponential(scale) and dtype in (torch.bfloat16, torch.float32)
    moved = code == "e4m3" and bounds(spread)[1] <= 64.0 and not _flushes()
    spread = spread.view(torch.uint8) if exponential(scale) else spread
    step = max(1, _CHUNK * torch.get_num_threads() // columns)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        mine = spread[part] if side == 1 else spread[which[part]]
        mine = mine.int().mul_(256) if packed else as_number(mine)
        mine = mine * 2.0**120 if moved else mine
        if packed:
            _looked_up(flat[part], mine, into[part], block[1])
        elif moved:
            _from_e4m3(flat[part], mine, into[part], block[1] or columns)
        else:
            table = _singles(code) if PER_BYTE[code] == 1 else _pairs(code).view(torch.int64).view(-1)
            found = torch.index_select(table.to(codes.device), 0, flat[part].int().view(-1)).view(torch.float32)
            into[part].copy_(_multiplied(found.view(-1, columns), mine, block[1] or columns))
        if code == "e4m3" and (int(flat[part].max()) == 255 or int(flat[part].view(torch.int8).max()) == 127):
            _put_nan(flat[part], into[part])
    return out


def _from_e4m3(codes: Tensor, factor: Tensor, into: Tensor, side: int) -> None:
    """e4m3's bits, moved to where fp32 has them, are 2^-120 times its value (of NaN, nothing)."""
    signed = codes.view(torch.int8)
    bits = signed.int() if into.dtype != torch.float32 else into.view(torch.int32).copy_(signed)
    bits.bitwise_left_shift_(20).bitwise_and_(-0x7810_0000)  # the sign, and seven bits from bit 26 on
    made = _multiplied(bits.view(torch.float32), factor, side)
    if into.dtype != torch.float32:
        into.copy_(made)


def _put_nan(codes: Tensor, into: Tensor) -> None:
    """NaN where the codes are, with its sign: rounding to bf16 would lose that."""
    into.masked_fill_(codes.bitwise_and(127) == 127, torch.nan)
    if into.dtype in (torch.bfloat16, torch.float32):
        bits = into.view(torch.int16 if into.dtype == torch.bfloat16 else torch.int32)
        places = 0 if into.dtype == torch.bfloat16 else 16
        bits.masked_fill_(codes == 127, 0x7FC0 << places).masked_fill_(codes == 255, -0x40 << places)


def _flushes() -> bool:
    """Whether this thread takes subnormal numbers for zero (`torch.set_flush_denormal`)."""
    return float(torch.tensor(2.0**-140) * 1.0) == 0


def _multiplied(values: Tensor, factor: Tensor, side: int) -> Tensor:
    """values [n, C] times factor [n, ceil(C / side)], in place."""
    n, columns = values.shape
    whole = columns // side
    values[:, : whole * side].view(n, whole, side).mul_(factor[:, :whole, None])
    if columns % side:
        values[:, whole * side :].mul_(factor[:, whole:])
    return values


def _looked_up(codes: Tensor, scale: Tensor, into: Tensor, side: int) -> None:
    """Two numbers at a time out of a table of all (scale, byte)."""
    n, columns = into.shape
    places = torch.empty(n, columns // side, side // 2, dtype=torch.int32, device=codes.device)
    torch.add(codes.view(places.shape), scale[:, :, None], out=places)
    two = torch.int32 if into.dtype == torch.bfloat16 else torch.int64
    table = _scaled_pairs(into.dtype).view(two).view(-1).to(codes.device)
    torch.index_select(table, 0, places.view(-1), out=into.view(two).view(-1))


@lru_cache
def _powers() -> Tensor:
    """[256]: what every byte of a scale stands for; as bits, which no thread takes for zero."""
    bits = torch.arange(256, dtype=torch.int32) << 23
    bits[0], bits[255] = 1 << 22, 0x7FC0 << 16
    return bits.view(torch.float32)


@lru_cache
def _singles(code: str) -> Tensor:
    """[256]: the value of every byte, of e4m3 or int8."""
    byte = torch.arange(256, dtype=torch.uint8)
    return byte.view(E4M3).float() if code == "e4m3" else byte.float() - 128


@lru_cache
def _pairs(code: str) -> Tensor:
    """[256, 2]: the two values of every byte, in fp32."""
    half = torch.tensor(_E2M1)
    values = torch.arange(16).sub(8).float() if code == "int4" else torch.cat([half, -half])
    byte = torch.arange(256)
    return torch.stack([values[byte % 16], values[byte // 16]], 1).contiguous()


@lru_cache
def _scaled_pairs(dtype: torch.dtype) -> Tensor:
    """[256 * 256, 2]: the two values of every byte under every scale; as bits, like `_powers`."""
    scale, m = torch.arange(256)[:, None], torch.arange(8)
    exponent = scale + m // 2 - 1  # of 2^(m // 2 - 1) * (1 or 1.5), and of 0.5, as fp32 has it
    digits = 1 << 23 | (m % 2 * (m > 1)) << 22
    small, large = digits >> (1 - exponent).clamp(min=0), digits + ((exponent - 1) << 23)
    bits = torch.where(exponent < 1, small, large).clamp(max=0x7F80 << 16) * (m > 0)
    bits[255] = 0x7FC0 << 16
    bits = torch.cat([bits, bits - 2**31], 1).int()
    byte, wide = torch.arange(256), dtype == torch.float32
    values = bits.view(torch.float32) if wide else (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.stack([values[:, byte % 16], values[:, byte // 16]], -1).view(-1, 2).contiguous()
