"""Formats as data: how a file spells the parts of a quantised tensor, and which codes and scales they hold."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from fmoe.codecs.format import FLOATS, Format
from fmoe.codecs.values import E4M3, E8M0

__all__ = ["FORMATS", "Format"]


def _formats(*rows: dict[str, Any]) -> dict[str, Format]:
    return {row["name"]: Format(**row) for row in rows}


_FP8 = dict(code="e4m3", block=(128, 128), sizes="squares")
_WHOLE = dict(code="e4m3", block=(0, 0), scales=FLOATS, source="Mistral-4")
_WHOLE |= dict(activation=("{S}.activation_scale", "{X}_activation_scale"))
_MXFP4 = dict(code="e2m1", block=(1, 32), stored=torch.uint8, scales=(torch.uint8,))
_PACKED = dict(weight="{S}.weight_packed", scale="{S}.weight_scale")
_DOT = dict(weight="{S}.weight", scale="{S}.scale", source="DeepSeek-V4")

_CT, _MODELOPT = "compressed-tensors ", "modelopt "
_SIDE = dict(weight="{S}.weight", scale="{S}.weight_scale", flat=True)
_NVFP4 = dict(code="e2m1", block=(1, 16), stored=torch.uint8, scales=(E4M3,), scale="{S}.weight_scale", flat=True)
_FP8_SIDE = dict(code="e4m3", scales=FLOATS, **_SIDE)
_PACK = dict(stored=torch.int32, scales=(torch.bfloat16, torch.float16, torch.float32), shape="{S}.weight_shape",
             sizes="groups", flat=True, method=_CT + "pack-quantized", **_PACKED)  # fmt: skip

_GPTQ = dict(block=(1, 32), stored=torch.int32, scales=(torch.float16, torch.bfloat16, torch.float32), sizes="groups",
             flat=True, weight="{S}.qweight", scale="{S}.scales", second="{S}.qzeros", form="[i o]")  # fmt: skip
_ONE = _GPTQ | dict(words="gptq", zeros="gptq", order="{S}.g_idx", method="gptq", source="GPTQModel, AutoGPTQ")
_TWO = _ONE | dict(zeros="gptq_v2", source="GPTQModel")
_AWQ = _GPTQ | dict(words="awq", zeros="awq", method="awq", source="AutoAWQ")
_STACK = dict(stack=True, scale="{X}_weight_scale", activation=("{X}_input_scale",), source="ModelOpt")
_INKLING = dict(stack=True, code="e2m1", block=(1, 16), stored=torch.uint8, scales=(E4M3,), lone="[E]")
_INKLING |= dict(method=_MODELOPT + "NVFP4")
_OFF = dict(second="{S}.weight_zero_point", source="compressed-tensors")

OWN = _formats(
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
    dict(_DOT, name="mxfp8 .scale", code="e4m3", block=(1, 32), scales=(E8M0,), beside="_scale_mxfp8",
         source="DeepSeek-V4.1's tables"),
    dict(_MXFP4, name="mxfp4 .scale", **_DOT) | dict(stored=torch.int8, scales=(E8M0,)),
    dict(_MXFP4, name="mxfp4 packed", method="compressed-tensors mxfp4-pack-quantized", source="Kimi-K3", **_PACKED),
    dict(name="int4", code="int4", block=(1, 32), stored=torch.int32, scales=(torch.bfloat16, torch.float16),
         shape="{S}.weight_shape", method="compressed-tensors pack-quantized", source="Kimi-K2.5", **_PACKED),
)  # fmt: skip
"""Formats that families publish: the names of their parts, natively, are those that `format.py` has."""

FOREIGN = _formats(
    dict(name="nvfp4", weight="{S}.weight", second="{S}.weight_scale_2", method=_MODELOPT + "NVFP4",
         source="ModelOpt", **_NVFP4),
    dict(name="nvfp4 packed", weight="{S}.weight_packed", second="{S}.weight_global_scale", divides=True, lone="[1]",
         method=_CT + "nvfp4-pack-quantized", source="compressed-tensors", **_NVFP4),
    dict(_MXFP4, name="mxfp4 side", method="quark", source="Quark, ModelOpt", **_SIDE),
    dict(name="mxfp8 side", code="e4m3", block=(1, 32), scales=(torch.uint8, E8M0), method=_CT + "mxfp8-quantized",
         source="compressed-tensors", **_SIDE),
    dict(name="int4 pack", code="int4", block=(1, 32), source="compressed-tensors", **_PACK),
    dict(name="int8 pack", code="int8", block=(1, 32), source="compressed-tensors", **_PACK),
    dict(name="int8 channel", code="int8", block=(1, 0), stored=torch.int8, scales=FLOATS,
         method=_CT + "int-quantized", source="compressed-tensors", **_SIDE),
    dict(name="int4 pack zeros", code="int4", block=(1, 32), zeros="rows", **_PACK, **_OFF),
    dict(name="int8 pack zeros", code="int8", block=(1, 32), zeros="rows", **_PACK, **_OFF),
    dict(name="int8 channel zeros", code="int8", block=(1, 0), stored=torch.int8, scales=FLOATS, zeros="signed",
         method=_CT + "int-quantized", **_SIDE, **_OFF),
    dict(name="gptq int4", code="int4", **_ONE),
    dict(name="gptq int8", code="int8", **_ONE),
    dict(name="gptq_v2 int4", code="int4", **_TWO),
    dict(name="gptq_v2 int8", code="int8", **_TWO),
    dict(name="awq int4", code="int4", **_AWQ),
    dict(_STACK, name="nvfp4 stack", code="e2m1", block=(16, 1), stored=torch.uint8, scales=(E4M3,), across=True,
         second="{X}_weight_scale_2", method=_MODELOPT + "NVFP4"),
    dict(_INKLING, name="nvfp4 stack .scale", scale="{X}.scale", second="{X}.scale2", source="Inkling"),
    dict(_INKLING, name="nvfp4 stack amax", scale="{W}_weight_scale", second="{W}_weight_amax", late=True, method="",
         third="{W}_weight_outer_scale_denominator", source="Inkling-2-Mini"),
    dict(_STACK, name="mxfp8 stack", code="e4m3", block=(1, 32), scales=(torch.uint8, E8M0), scale="{W}_weight_scale",
         method="mxfp8", source="Inkling-2-Small-MXFP8"),
    dict(_STACK, name="mxfp8 stack side", code="e4m3", block=(1, 32), scales=(torch.uint8, E8M0),
         method=_MODELOPT + "MXFP8"),
    dict(_MXFP4, name="mxfp4 stack side", method=_MODELOPT + "MXFP4") | _STACK,
    dict(_STACK, name="fp8 stack rows", code="e4m3", block=(1, 0), scales=FLOATS, scale="{W}_weight_scale",
         method=_CT + "float-quantized", source="compressed-tensors"),
    dict(_STACK, name="fp8 stack experts", code="e4m3", block=(0, 0), rank=1, scales=FLOATS,
         method=_MODELOPT + "FP8_PER_CHANNEL_PER_TOKEN"),
    dict(_STACK, name="fp8 stack tensor", code="e4m3", block=(0, 0), rank=0, scales=FLOATS, method=_MODELOPT + "FP8"),
    dict(name="fp8 side channel", block=(1, 0), method=_CT + "float-quantized", source="compressed-tensors, fbgemm",
         **_FP8_SIDE),
    dict(name="fp8 side row", block=(1, 0), form="[o]", method=_MODELOPT + "FP8_PER_CHANNEL_PER_TOKEN",
         source="ModelOpt", **_FP8_SIDE),
    dict(name="fp8 side one", block=(0, 0), form="[1]", method=_CT + "float-quantized", source="compressed-tensors",
         **_FP8_SIDE),
    dict(name="fp8 side tensor", block=(0, 0), form="()", method=_MODELOPT + "FP8", source="ModelOpt", **_FP8_SIDE),
    dict(name="fp8 side groups", block=(1, 32), sizes="groups", method=_CT + "float-quantized",
         source="compressed-tensors", **_FP8_SIDE),
    dict(name="fp8 side blocks", block=(128, 128), sizes="squares", method=_CT + "float-quantized",
         source="compressed-tensors", **_FP8_SIDE),
    dict(name="fp8 side blocks [o 1 i 1]", block=(128, 128), sizes="squares", form="[o 1 i 1]",
         method=_MODELOPT + "FP8_PB_WO", source="ModelOpt", **_FP8_SIDE),
)  # fmt: skip
"""Formats that tools write for any family."""
EVERYWHERE = ("fp8 blocks", "mxfp8", "mxfp4 packed")
"""Of the formats that families publish, those that are read in all."""
ACTIVATIONS = ("input_scale", "input_global_scale", "input_scale_ub", "k_scale", "v_scale")
"""Parts that mean nothing for weights, and may be there for some experts only."""
UNREAD_OF = {
    "weight_zero_point": "zero points",
    "weight_g_idx": "an activation order",
    "pre_quant_scale": "AWQ scales",
    "svdquant_lora_a": "a low-rank part",
}
"""Parts that change what codes mean, and what they are."""
UNREAD = tuple(f"{{S}}.{name}" for name in UNREAD_OF)
APART = (*ACTIVATIONS, "g_idx")
"""Parts that keep their names: those, and GPTQ's group of each column, which decoding looks at."""
OF_STACKS = ("original_shape", "input_amax")
"""The same of Inkling's stacks: X.original_shape."""


def _suffix(name: str) -> str:
    return "_scale_" + re.sub(r"\W+", "_", name).strip("_")


FOREIGN = {n: replace(f, beside=_suffix(n)) for n, f in FOREIGN.items()}
FORMATS = OWN | FOREIGN


def elsewhere(own: Collection[str]) -> tuple[Format, ...]:
    """The formats that a family reads beside its own, the suffix of each not any other's."""
    taken = any(FORMATS[n].beside == "_scale_inv" for n in own)
    apart = lambda f: f if f.name == "fp8 blocks" and not taken else replace(f, beside=f"{_suffix(f.name)}_inv")
    return (*(apart(FORMATS[n]) for n in EVERYWHERE if n not in own), *FOREIGN.values())
