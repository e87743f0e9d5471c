"""What is done to the parts of one quantised tensor: decoded, encoded, kept; which rows of them go together."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fmoe.codecs import Change
from fmoe.codecs.foreign import twofold
from fmoe.codecs.foreign.affine import is_plain
from fmoe.codecs.parts import Parts
from fmoe.codecs.survival import Survival, survival
from fmoe.types import AdapterError, Problem


def rows(p: Parts) -> dict[str, int]:
    """How many rows of each part go together; nothing of one scale for all."""
    side = 1 if len(p.shape) > 2 else p.format.block[0]
    if p.format.stack and p.second:
        whole = {name: 1 if shape else 0 for there, here, shape, _ in p.kept for name in (there, here)}
        return dict.fromkeys((p.name, p.codes), 1) | whole
    if not side or p.second or p.format.form or p.format.shards > 1:
        return {}
    scale = 0 if p.format.rank == 0 else 1
    return dict.fromkeys((p.name, p.codes), side) | dict.fromkeys((p.scale, p.beside), scale)


def cuts(p: Parts, encoding: bool) -> tuple[int, ...]:
    """Between how many entries of the codes' (or the tensor's) last dimensions a DTensor may be cut."""
    f = p.format
    if f.transposed:
        return (0, 0) if encoding else (0, 0, 0)
    if p.second or f.form or f.shards > 1:
        return (0, 0)
    last = f.block[1] if encoding else f.block[1] // f.packed
    return (f.block[0], last)


def decoding(p: Parts, dtype: torch.dtype) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = p.here(params)
        try:
            second = _second(p, held)
            how = {"order": held[p.order]} if p.order else {}
            weight = p.format.decode(held[p.name], held[p.beside], dtype, second=second, **how)
            _leads_back(p, weight, held)
        except ValueError as error:
            raise AdapterError([Problem(f"{p.scale!r}: {error}", (p.scale,))]) from None
        _compare(p, params)
        return held | {p.name: weight}

    return change


def _second(p: Parts, held: Mapping[str, Tensor]) -> Tensor | None:
    """The scale of scales that the format's `decode` takes."""
    second = held.get(p.second[1]) if p.second else None
    third = held.get(p.third[1]) if p.third else None
    return second if second is None or third is None else second.float() / third.float()


def _leads_back(p: Parts, weight: Tensor, held: Mapping[str, Tensor]) -> None:
    """Raises ValueError where bf16 rounds numbers of 8 bits away from their codes: with zero points, they have nine."""
    narrow = weight.dtype == torch.bfloat16 and not weight.is_meta
    if not (narrow and p.second and p.format.zeros and p.format.code == "int8"):
        return
    codes = p.format.under(weight, held[p.beside], held[p.second[1]], held.get(p.order or ""), strict=False)
    if not torch.equal(codes, held[p.name]):
        why = "codes more than 128 from their zero point decode in bfloat16 to numbers that do not lead back to them"
        raise ValueError(f"{why}. Fix: dtype='float32' or 'float16'")


def encoding(p: Parts, told: Callable[[Survival], None] | None = None) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            made, used, was = _under_zeros(p, params) if p.format.zeros else _encoded(p, params)
        except ValueError as error:
            raise AdapterError([Problem(f"{p.name!r}: {error}", (p.name,))]) from None
        if told and was is not None and (found := survival(p, params[p.name], was, made, used)):
            told(found)
        return p.there(made) | _made(p, made[p.name])

    return change


def _encoded(p: Parts, params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """(codes and scales, the whole scale, the one that the weight was decoded with, if any)"""
    was = params.get(p.beside)
    if not p.second:
        codes, scale = p.format.encode(params[p.name], was)
        return {p.name: codes, p.beside: scale}, scale, was
    before, under = params.get(p.second[1]), (params.get(p.third[1]) if p.third else None)
    codes, scale, second = twofold.encode(p.format, params[p.name], was, before, under)
    made = {p.name: codes, p.beside: scale, p.second[1]: second}
    made |= {p.third[1]: twofold.third(second) if under is None else under} if p.third else {}
    now, then = _second(p, made), _second(p, params)
    assert now is not None
    was = None if was is None or then is None else p.format.folded(was, then)
    return made, p.format.folded(scale, now), was


def _under_zeros(p: Parts, params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The same of zero points: codes under those that the weight was decoded with."""
    assert p.second
    held = {n: params[n] for n in (p.beside, p.second[1], p.order) if n}
    codes = p.format.under(params[p.name], held[p.beside], held[p.second[1]], held.get(p.order or ""))
    return {p.name: codes} | held, held[p.beside], held[p.beside]


def keeping(p: Parts, flipped: bool) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if flipped:
            return p.there(params) | _made(p, params[p.name])
        _compare(p, params)
        held = p.here(params)
        if p.order and not is_plain(held[p.order], p.format.block[1] or p.shape[1]):
            text = f"{p.order!r}: {p.format.name} with an activation order, whose columns are not in whole groups"
            raise AdapterError([Problem(f"{text}. Fix: decode it, without quantized='keep'", (p.order, p.codes))])
        return held

    return change


def _made(p: Parts, like: Tensor) -> dict[str, Tensor]:
    return {p.extent: torch.tensor(p.shape, device=like.device)} if p.extent else {}


def _compare(p: Parts, params: Mapping[str, Tensor]) -> None:
    if p.extent and not params[p.extent].is_meta and tuple(params[p.extent].tolist()) != p.shape:
        text = f"{p.extent!r} says {params[p.extent].tolist()}, expected {list(p.shape)}: what {p.codes!r} holds"
        raise AdapterError([Problem(text, (p.extent, p.codes))])
