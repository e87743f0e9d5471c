"""What is done to the parts of one quantised tensor: decoded, encoded, kept; which rows of them go together."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fmoe.codecs import Change
from fmoe.codecs.foreign import twofold
from fmoe.codecs.parts import Parts
from fmoe.codecs.survival import Survival, survival
from fmoe.types import AdapterError, Problem


def rows(p: Parts) -> dict[str, int]:
    """How many rows of each part go together; nothing of one scale for all."""
    side = 1 if len(p.shape) > 2 else p.format.block[0]
    if not side or p.second or p.format.form:
        return {}
    scale = 0 if p.format.rank == 0 else 1
    return dict.fromkeys((p.name, p.codes), side) | dict.fromkeys((p.scale, p.beside), scale)


def cuts(p: Parts, encoding: bool) -> tuple[int, ...]:
    """Between how many entries of the codes' (or the tensor's) last dimensions a DTensor may be cut."""
    f = p.format
    if f.transposed:
        return (0, 0) if encoding else (0, 0, 0)
    if p.second or f.form:
        return (0, 0)
    last = f.block[1] if encoding else f.block[1] // f.packed
    return (f.block[0], last)


def decoding(p: Parts, dtype: torch.dtype) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = {here: _spelled(params[there], *shapes) for there, here, *shapes in p.kept}
        try:
            second = held[p.second[1]] if p.second else None
            weight = p.format.decode(params[p.codes], held[p.beside], dtype, second=second)
        except ValueError as error:
            raise AdapterError([Problem(f"{p.scale!r}: {error}", (p.scale,))]) from None
        _compare(p, params)
        return {p.name: weight} | held

    return change


def encoding(p: Parts, told: Callable[[Survival], None] | None = None) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            if p.second:
                given = (params.get(p.beside), params.get(p.second[1]))
                codes, scale, second = twofold.encode(p.format, params[p.name], *given)
                made, used = {p.second[0]: second.reshape(p.kept[1][2])}, p.format.folded(scale, second)
                was = None if given[0] is None or given[1] is None else p.format.folded(given[0], given[1])
            else:
                was = params.get(p.beside)
                (codes, scale), made = p.format.encode(params[p.name], was), {}
                used = scale
        except ValueError as error:
            raise AdapterError([Problem(f"{p.name!r}: {error}", (p.name,))]) from None
        if told and was is not None and (found := survival(p, params[p.name], was, codes, used)):
            told(found)
        _, _, there, here = p.kept[0]
        return {p.codes: codes, p.scale: _spelled(scale, here, there)} | made | _made(p, codes)

    return change


def _spelled(scale: Tensor, was: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A scale in another spelling; as it is where both are one: it may be of some rows alone."""
    return scale if was == shape else scale.reshape(shape)


def keeping(p: Parts, flipped: bool) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if flipped:
            return {p.codes: params[p.name]} | _made(p, params[p.name])
        _compare(p, params)
        return {p.name: params[p.codes]}

    return change


def _made(p: Parts, like: Tensor) -> dict[str, Tensor]:
    return {p.extent: torch.tensor(p.shape, device=like.device)} if p.extent else {}


def _compare(p: Parts, params: Mapping[str, Tensor]) -> None:
    if p.extent and not params[p.extent].is_meta and tuple(params[p.extent].tolist()) != p.shape:
        text = f"{p.extent!r} says {params[p.extent].tolist()}, expected {list(p.shape)}: what {p.codes!r} holds"
        raise AdapterError([Problem(text, (p.extent, p.codes))])
