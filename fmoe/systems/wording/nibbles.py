"""MXFP4 between two files' orders of codes: Hugging Face's blocks and scales, and GGUF's blocks, bytes to bytes.

A block is 32 values. Hugging Face: 16 bytes, the even value in the low nibble, and one scale elsewhere. GGUF: the scale
and then 16 bytes, values 0 to 15 in the low nibbles and 16 to 31 in the high ones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmoe.codecs import Change, Changed, CodecPlan
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.systems.wording.stages import Stateless
from fmoe.types import AdapterError, Problem, TensorSpec


@dataclass(frozen=True)
class Nibbles(Stateless):
    """X_blocks [.., n, 16] and X_scales [.., n] <-> X_packed [.., 17 n], uint8, for every X that fits the pattern."""

    pattern: str
    flipped: bool = False
    lossless: bool = True

    @property
    def inverse(self) -> "Nibbles":
        return replace(self, flipped=not self.flipped)

    def rename(self, names: Names) -> list[str]:
        ends = ("_packed", "") if self.flipped else ("_blocks", "_scales")
        made = []
        for name in names.names:
            end = next((e for e in ends if e and name.endswith(e)), "")
            if end and re.fullmatch(self.pattern, name.removesuffix(end)):
                x = name.removesuffix(end)
                made += [x + "_blocks", x + "_scales"] if self.flipped else [x + "_packed"]
            else:
                made.append(name)
        return list(dict.fromkeys(made))

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        return self._unpacked(specs) if self.flipped else self._packed(specs)

    def _packed(self, specs: Specs) -> CodecPlan:
        targets, changes, problems = dict(specs), [], []
        for blocks in [n for n in specs if n.endswith("_blocks") and re.fullmatch(self.pattern, n[:-7])]:
            x = blocks[:-7]
            scales, shape = x + "_scales", specs[blocks].shape
            if specs.get(scales) != TensorSpec(shape[:-1], torch.uint8) or shape[-1:] != (16,):
                text = f"{blocks!r} {list(shape)}: expected uint8 [.., n, 16], and {scales!r} [.., n] beside it"
                problems.append(Problem(text, (blocks, scales)))
                continue
            del targets[blocks], targets[scales]
            targets[x + "_packed"] = TensorSpec((*shape[:-2], 17 * shape[-2]), torch.uint8)
            rows = dict.fromkeys((blocks, scales, x + "_packed"), 1)
            changes.append(Changed([blocks, scales], [x + "_packed"], _pack(x), rows))
        if problems:
            raise AdapterError(problems)
        return CodecPlan(targets, tuple(changes), str(self))

    def _unpacked(self, specs: Specs) -> CodecPlan:
        targets, changes = dict(specs), []
        mine = [n for n in specs if n.endswith("_packed") and re.fullmatch(self.pattern, n[:-7])]
        if odd := tuple(n for n in mine if specs[n].shape[-1] % 17 or specs[n].dtype != torch.uint8):
            raise AdapterError([Problem(f"{some(odd)}: expected uint8, 17 bytes for each 32 values", odd)])
        for packed in mine:
            x, shape = packed[:-7], specs[packed].shape
            n = shape[-1] // 17
            del targets[packed]
            targets[x + "_blocks"] = TensorSpec((*shape[:-1], n, 16), torch.uint8)
            targets[x + "_scales"] = TensorSpec((*shape[:-1], n), torch.uint8)
            rows = dict.fromkeys((packed, x + "_blocks", x + "_scales"), 1)
            changes.append(Changed([packed], [x + "_blocks", x + "_scales"], _unpack(x), rows))
        return CodecPlan(targets, tuple(changes), str(self))

    def __str__(self) -> str:
        return f"MXFP4 blocks in GGUF's order{' (backwards)' * self.flipped}"


def _pack(x: str) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks, scales = params[x + "_blocks"], params[x + "_scales"]
        values = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # [.., n, 32]
        codes = values[..., :16] | values[..., 16:] << 4
        return {x + "_packed": torch.cat([scales.unsqueeze(-1), codes], -1).flatten(-2)}

    return change


def _unpack(x: str) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed = params[x + "_packed"]
        both = packed.unflatten(-1, (-1, 17))
        codes = both[..., 1:]
        values = torch.cat([codes & 15, codes >> 4], -1)  # [.., n, 32]
        blocks = values[..., 0::2] | values[..., 1::2] << 4
        return {x + "_blocks": blocks, x + "_scales": both[..., 0].contiguous()}

    return change


@dataclass(frozen=True)
class Words(Stateless):
    """X [.., n, 16] uint8 <-> X [.., 4 n] uint32, the same bytes, for every X that fits the pattern."""

    pattern: str
    flipped: bool = False
    lossless: bool = True

    @property
    def inverse(self) -> "Words":
        return replace(self, flipped=not self.flipped)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        targets, changes = dict(specs), []
        for name in (n for n in specs if re.fullmatch(self.pattern, n)):
            (shape, dtype), flipped = specs[name], self.flipped
            if (
                flipped
                and (dtype != torch.uint32 or shape[-1] % 4)
                or not flipped
                and (dtype != torch.uint8 or shape[-1] != 16)
            ):
                text = f"{name!r}: {dtype} {list(shape)}, expected " + (
                    "uint32 [.., 4 n]" if flipped else "uint8 [.., n, 16]"
                )
                raise AdapterError([Problem(text, (name,))])
            made = (*shape[:-1], shape[-1] // 4, 16) if flipped else (*shape[:-2], 4 * shape[-2])
            targets[name] = TensorSpec(made, torch.uint8 if flipped else torch.uint32)
            changes.append(Changed([name], [name], _seen(name, targets[name]), {name: 1}))
        return CodecPlan(targets, tuple(changes), str(self))

    def __str__(self) -> str:
        return f"MXFP4 blocks as words of 32 bits{' (backwards)' * self.flipped}"


def _seen(name: str, spec: TensorSpec) -> Change:
    inner = spec.shape[-2:] if spec.dtype == torch.uint8 else spec.shape[-1:]
    flat = lambda t: t.contiguous().flatten(-2) if spec.dtype == torch.uint32 else t.contiguous()
    return lambda params: {name: (t := flat(params[name])).view(spec.dtype).reshape(*t.shape[:-1], *inner)}
