"""Formats as data: how a file spells the parts of a quantised tensor, and which codes and scales they hold."""

from typing import Any

import torch

from fmoe.codecs.format import FLOATS, Format
from fmoe.codecs.values import E8M0

__all__ = ["FORMATS", "Format"]


def _formats(*rows: dict[str, Any]) -> dict[str, Format]:
    return {row["name"]: Format(**row) for row in rows}


_FP8 = dict(code="e4m3", block=(128, 128))
_WHOLE = dict(code="e4m3", block=(0, 0), scales=FLOATS, source="Mistral-4")
_WHOLE |= dict(activation=("{S}.activation_scale", "{X}_activation_scale"))
_MXFP4 = dict(code="e2m1", block=(1, 32), stored=torch.uint8, scales=(torch.uint8,))
_PACKED = dict(weight="{S}.weight_packed", scale="{S}.weight_scale")
_DOT = dict(weight="{S}.weight", scale="{S}.scale", source="DeepSeek-V4")

FORMATS = _formats(
    dict(name="fp8 blocks", scales=(*FLOATS, E8M0), source="DeepSeek-V3, Qwen, GLM, MiniMax-M2, MiMo", **_FP8),
    dict(name="fp8 blocks .scale", scales=(E8M0, *FLOATS), **_FP8, **_DOT),
    dict(name="fp8 tensor", rank=0, beside="_scale_tensor", **_WHOLE),
    dict(name="fp8 expert [E 1 1]", beside="_scale_each", **_WHOLE),
    dict(name="fp8 expert [E]", rank=1, beside="_scale_expert", **_WHOLE),
    dict(_WHOLE, name="fp8 qscale", rank=0, beside="_scale_tensor", weight="{S}.weight", scale="{S}.qscale_weight",
         activation=("{S}.qscale_act",), source="Mistral's own files"),
    dict(name="mxfp8", code="e4m3", block=(1, 32), scales=(torch.uint8, E8M0), method="mxfp8",
         source="MiniMax-M3"),
    dict(_MXFP4, name="mxfp4 blocks", weight="{X}_blocks", scale="{X}_scales", transposed=True, grouped=True,
         method="mxfp4", source="gpt-oss"),
    dict(_MXFP4, name="mxfp4 .scale", **_DOT) | dict(stored=torch.int8, scales=(E8M0,), zero=True),
    dict(_MXFP4, name="mxfp4 packed", method="compressed-tensors mxfp4-pack-quantized", source="Kimi-K3", **_PACKED),
    dict(name="int4", code="int4", block=(1, 32), stored=torch.int32, scales=(torch.bfloat16, torch.float16),
         shape="{S}.weight_shape", method="compressed-tensors pack-quantized", source="Kimi-K2.5", **_PACKED),
)  # fmt: skip
