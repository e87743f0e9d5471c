"""Integers of 4 or 8 bits in words of 32, and their zero points, as tools order them.

Here codes are [o, i / p] int32: p numbers a word, those of neighbouring columns, the first at the low end. A zero
point is one number, uint8, for each scale, [o, g], which counts from the least code. In a file:

    gptq      codes [i / p, o], scales [g, o], zeros [g, o / p]: the numbers of p rows, or columns, a word
    awq       codes [i, o / p], zeros [g, o / p]: p columns a word, in the order 0 2 4 6 1 3 5 7
    rows      zeros [ceil(o / p), g]: p rows a word, what is left over 0
    signed    zeros [o, g] int8, which counts from code 0

GPTQ's first version stores a zero point less one, modulo the number of codes; its second stores it as it is. Nothing
else tells them apart, but that the first stores what is symmetric one below the middle, and the second in it.
"""

import torch
from torch import Tensor

from fmoe.types import AdapterError, Problem, TensorSpec

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
Shape = tuple[int, ...]


def codes_spec(words: str, spec: TensorSpec, p: int) -> TensorSpec:
    """What a file has in place of these codes."""
    if not words:
        return spec
    o, i = spec.shape[0], spec.shape[1] * p
    return TensorSpec((i // p, o) if words == "gptq" else (i, o // p), spec.dtype)


def laid_spec(words: str, spec: TensorSpec, p: int) -> TensorSpec | None:
    """The inverse of `codes_spec`; None for what no codes can be."""
    if not words:
        return spec
    if len(spec.shape) != 2 or words == "awq" and spec.shape[0] % p:
        return None
    rows, columns = spec.shape
    return TensorSpec((columns, rows) if words == "gptq" else (columns * p, rows // p), spec.dtype)


def zeros_spec(zeros: str, grid: Shape, p: int) -> TensorSpec:
    """What a file has in place of zero points of that shape."""
    o, g = grid
    if zeros == "signed":
        return TensorSpec((o, g), torch.int8)
    return TensorSpec((-(-o // p), g) if zeros == "rows" else (g, -(-o // p)), torch.int32)


def codes_here(words: str, codes: Tensor, bits: int) -> Tensor:
    """The codes of a file, as they are here.

    >>> codes_here("gptq", torch.tensor([[1], [2]], dtype=torch.int32), 4)
    tensor([[1, 2]], dtype=torch.int32)
    """
    if words == "awq":
        return packed(_ordered(unpacked(codes, bits), bits, AWQ, back=True).mT, bits)
    return codes.mT if words == "gptq" else codes


def codes_there(words: str, codes: Tensor, bits: int) -> Tensor:
    """The inverse of `codes_here`."""
    if words == "awq":
        return packed(_ordered(unpacked(codes, bits).mT, bits, AWQ), bits)
    return codes.mT.contiguous() if words == "gptq" else codes


def zeros_here(zeros: str, stored: Tensor, rows: int, bits: int, *, unsaid: str = "", name: str = "") -> Tensor:
    """The zero points of a file, as they are here: of so many rows. unsaid: no config says GPTQ's version, or
    its method either; a method without a version is the first for Transformers.

    Raises AdapterError, with the name, where what is left over of a word is not 0, and for what may be either version.

    >>> zeros_here("gptq", torch.tensor([[0x7777777F]], dtype=torch.int32), 8, 4)[:2, 0]  # stored: 15 and 7
    tensor([0, 8], dtype=torch.uint8)
    """
    if zeros == "signed":
        return stored.view(torch.uint8) ^ 128
    if zeros == "rows":
        found = unpacked(stored.mT, bits)
        if not stored.is_meta and bool(found[:, rows:].any()):
            told = f"{name!r}: what the last zero points leave of a word is not 0, expected {rows} rows of them"
            raise AdapterError([Problem(told, (name,))])
        return found[:, :rows].mT
    found = unpacked(stored, bits)
    if zeros == "awq":
        found = _ordered(found, bits, AWQ, back=True)
    elif zeros == "gptq":
        if unsaid and not stored.is_meta and not _is_first(found, 2 ** (bits - 1), known=unsaid == "version"):
            told = f"{name!r}: zero points of GPTQ, whose first version stores them less one; quantization_config does"
            told = f'{told} not say which version it is. Fix: "checkpoint_format": "gptq" there, or "gptq_v2"'
            raise AdapterError([Problem(told, (name,))])
        found = (found + 1) & (2**bits - 1)
    return found.mT


def _is_first(stored: Tensor, middle: int, *, known: bool) -> bool:
    """Whether zero points are as GPTQ's first version has them. known: it is GPTQ, and they alone may say otherwise."""
    return bool((stored != middle).any()) if known else bool((stored == middle - 1).all())


def zeros_there(zeros: str, here: Tensor, bits: int) -> Tensor:
    """The inverse of `zeros_here`."""
    if zeros == "signed":
        return (here ^ 128).view(torch.int8)
    found = here.mT
    if zeros == "rows":
        return packed(torch.nn.functional.pad(found, (0, -found.shape[1] % (32 // bits))), bits).mT.contiguous()
    if zeros == "awq":
        found = _ordered(found, bits, AWQ)
    elif zeros == "gptq":
        found = (found - 1) & (2**bits - 1)
    return packed(found, bits)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """[R, C] int32 -> [R, C * 32 / bits] uint8, the low end of every word first."""
    byte = words.flatten().view(torch.uint8).view(len(words), -1)
    return byte if bits == 8 else torch.stack([byte & 15, byte >> 4], -1).flatten(-2)


def packed(numbers: Tensor, bits: int) -> Tensor:
    """The inverse of `unpacked`."""
    byte = numbers if bits == 8 else numbers[:, 0::2] | numbers[:, 1::2] << 4
    return byte.flatten().view(torch.int32).view(len(byte), -1)


def _ordered(numbers: Tensor, bits: int, order: tuple[int, ...], *, back: bool = False) -> Tensor:
    """Every eight columns in that order; back: out of it."""
    places = torch.tensor(order, device=numbers.device)
    places = places.argsort() if back else places
    return numbers.unflatten(-1, (-1, 8))[..., places].flatten(-2)
