"""Quantised checkpoints of every family that has a format, and the formats' values written out one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fmoe
from fmoe.codecs.formats import FORMATS, Format
from fmoe.codecs.parts import as_named
from fmoe.families import family

E = 3
W123 = ("w1", "w3", "w2")
PROJ = ("gate_proj", "up_proj", "down_proj")
MLP = "model.layers.1.mlp.experts."


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(nibble: int) -> float:
    sign, exponent, mantissa = -1 if nibble & 8 else 1, nibble >> 1 & 3, nibble & 1
    return sign * (mantissa / 2 if not exponent else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def factor(scale: Tensor) -> float:
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return 2.0 ** (int(scale.view(torch.uint8)) - 127)
    return float(scale)


def by_hand(f: Format, codes: Tensor, scale: Tensor) -> Tensor:
    """The tensor that a format's parts say, in fp64: one number after the other, by the format's definition alone."""
    if codes.ndim - f.grouped == 3:
        lone = lambda e: scale if scale.ndim == 0 else scale[e]
        return torch.stack([by_hand(f, codes[e], lone(e)) for e in range(len(codes))])
    per_word = {"e4m3": 1, "e2m1": 2, "int4": 8, "int8": 4 if f.stored == torch.int32 else 1}[f.code]
    rows = [row.flatten() for row in codes]
    R, C = len(rows), rows[0].numel() * per_word
    out = [[0.0] * C for _ in range(R)]
    factors = [factor(s) for s in scale.flatten()]
    across = scale.shape[1] if scale.ndim == 2 else 1
    for r in range(R):
        words = rows[r].view(torch.int32 if f.stored == torch.int32 else torch.uint8).tolist()
        for c in range(C):
            word = words[c // per_word]
            if f.code == "e4m3":
                value = e4m3(word)
            elif f.code == "int8":
                byte = word >> 8 * (c % per_word) & 255
                value = float(byte - 128 if per_word == 4 else byte - 256 * (byte > 127))
            else:
                nibble = word >> 4 * (c % per_word) & 15
                value = nibble - 8.0 if f.code == "int4" else e2m1(nibble)
            at = r // (f.block[0] or R) * across + c // (f.block[1] or C)
            out[r][c] = value * factors[0 if scale.ndim == 0 or f.each else at]
    made = torch.tensor(out, dtype=torch.float64).view(R, C)
    return made.mT if f.transposed else made


def parts(fmt: str, name: str, weight: Tensor) -> dict[str, Tensor]:
    """The parts that a file holds of a tensor of this name."""
    f = FORMATS[fmt]
    codes, scale = f.encode(weight)
    p = as_named(name, f, tuple(weight.shape))
    assert p is not None
    made = {p.codes: codes, p.scale: scale}
    return made | ({p.extent: torch.tensor(weight.shape)} if p.extent else {})


def per_expert(prefix: str, fmt: str | None, names: tuple[str, str, str], D: int, I: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for e in range(E):
        for name, shape in zip(names, ((I, D), (I, D), (D, I)), strict=True):
            key, weight = f"{prefix}{e}.{name}.weight", noise(*shape)
            out |= parts(fmt, key, weight) if fmt else {key: weight}
    return out


def fused(prefix: str, fmt: str | None, D: int, I: int, turned: bool = False) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, shape in (("gate_up_proj", (E, 2 * I, D)), ("down_proj", (E, D, I))):
        weight = noise(*shape)
        weight = weight.mT.contiguous() if turned else weight
        out |= parts(fmt, prefix + name, weight) if fmt else {prefix + name: weight}
    if turned:
        out |= {f"{prefix}gate_up_proj_bias": noise(E, 2 * I), f"{prefix}down_proj_bias": noise(E, D)}
    return out


def noise(*shape: int) -> Tensor:
    spread = torch.exp(2 * torch.randn(*shape[:-1], 1))
    return (torch.randn(shape) * spread).bfloat16()


def active(made: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    return made | {f"{MLP}{n}_activation_scale": torch.rand(shape) for n in ("gate_up_proj", "down_proj")}


V4, K3 = "layers.1.ffn.experts.", "language_model.model.layers.1.block_sparse_moe.experts."
K25, M3 = "language_model.model.layers.1.mlp.experts.", "model.layers.1.block_sparse_moe.experts."

Make = Callable[[int, int], dict[str, Tensor]]
# (family, what is in it, its format) -> the experts of one layer, given D and I
CASES: dict[tuple[str, str], Make] = {
    ("deepseek_v3", "fp8 blocks"): lambda D, I: per_expert(MLP, "fp8 blocks", PROJ, D, I),
    ("minimax_m2", "fp8 blocks"): lambda D, I: per_expert(M3, "fp8 blocks", W123, D, I),
    ("mimo_v2_flash", "fp8 blocks"): lambda D, I: per_expert(MLP, "fp8 blocks", PROJ, D, I),
    ("deepseek_v4", "mxfp4 .scale"): lambda D, I: per_expert(V4, "mxfp4 .scale", W123, D, I),
    ("deepseek_v4", "fp8 blocks .scale"): lambda D, I: per_expert(V4, "fp8 blocks .scale", W123, D, I),
    ("kimi_k3", "mxfp4 packed"): lambda D, I: per_expert(K3, "mxfp4 packed", W123, D, I),
    ("kimi_k25", "int4"): lambda D, I: per_expert(K25, "int4", PROJ, D, I),
    ("minimax_m3_vl_text", "mxfp8"): lambda D, I: per_expert(M3, "mxfp8", W123, D, I),
    ("gpt_oss", "mxfp4 blocks"): lambda D, I: fused(MLP, "mxfp4 blocks", D, I, turned=True),
    ("mistral4", "fp8 expert [E 1 1]"): lambda D, I: active(fused(MLP, "fp8 expert [E 1 1]", D, I), (E,)),
    ("mistral4", "fp8 expert [E]"): lambda D, I: fused(MLP, "fp8 expert [E]", D, I),
    ("mistral4", "fp8 tensor"): lambda D, I: active(fused(MLP, "fp8 tensor", D, I), ()),
}
PLAIN: dict[str, Make] = {
    "deepseek_v3": lambda D, I: per_expert(MLP, None, PROJ, D, I),
    "deepseek_v4": lambda D, I: per_expert(V4, None, W123, D, I),
    "kimi_k3": lambda D, I: per_expert(K3, None, W123, D, I),
    "kimi_k25": lambda D, I: per_expert(K25, None, PROJ, D, I),
    "minimax_m3_vl_text": lambda D, I: per_expert(M3, None, W123, D, I),
    "gpt_oss": lambda D, I: fused(MLP, None, D, I, turned=True),
    "mistral4": lambda D, I: fused(MLP, None, D, I),
}

FEW: dict[str, Make] = {
    "qwen3_moe": lambda D, I: per_expert(MLP, None, PROJ, D, I),
    "mixtral": lambda D, I: per_expert(M3, None, W123, D, I),
    "gpt_oss": PLAIN["gpt_oss"],
}
"""Plain checkpoints of which few or no formats are published."""


def config(model_type: str, D: int, I: int) -> dict[str, Any]:
    fields = family(model_type).fields
    sizes = dict(n_routed_experts=E, n_activated_experts=1, dim=D, moe_inter_dim=I)
    return {"model_type": model_type} | {fields[f].split()[0]: n for f, n in sizes.items()}


def made(case: tuple[str, str], D: int = 128, I: int = 256, **how: Any) -> tuple[fmoe.Adapter, dict[str, Tensor]]:
    """A family's adapter, resolved, and the tensors of a checkpoint in one of its formats."""
    torch.manual_seed(0)
    tensors = CASES[case](D, I) | {"model.norm.weight": torch.ones(D).bfloat16()}
    return fmoe.adapter(case[0], config(case[0], D, I), **how).resolve(tensors), tensors
