"""Formats that are not read: what a quantization_config says, and the name that an error gives it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fmoe.codecs.config import bits, quantization_of
from fmoe.codecs.foreign.lists import Lists
from fmoe.codecs.parts import Parts
from fmoe.layout.claims import some
from fmoe.layout.names import Names
from fmoe.types import Problem, TensorSpec

READ: Mapping[str, tuple[str, Collection[str | None]]] = {
    "compressed-tensors": (
        "format",
        {None, "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized",
         "mxfp8-quantized", "naive-quantized", "nvfp4-pack-quantized", "pack-quantized"},
    ),
    "modelopt": (
        "quant_algo",
        {None, "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", "MXFP4", "MXFP8", "NVFP4",
         "NVFP4_AWQ", "W4A16_NVFP4"},
    ),
    "gptq": ("checkpoint_format", {None, "gptq", "gptq_v2"}),
    "awq": ("version", {None, "gemm", "GEMM"}),
    "fbgemm_fp8": ("", {None}),
    "fp8": ("", {None}),
    "mxfp4": ("", {None}),
    "mxfp8": ("", {None}),
    "quark": ("", {None}),
}  # fmt: skip
"""quant_method -> the field that says which of its formats, and those that are read."""
WORDS = ("gptq", "awq", "compressed-tensors")
"""Methods that pack integers of any number of bits, of which 4 and 8 are read."""


def undecoded(config: Mapping[str, Any] | None) -> str | None:
    """The name of the format that a config says its tensors are in, if it is none that is read.

    >>> undecoded({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    'bitsandbytes'
    >>> undecoded({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}})
    'awq gemv'
    >>> undecoded({"quantization_config": {"quant_method": "fp8"}})
    """
    told = quantization_of(config) or {}
    method = told.get("quant_method")
    if method is None or method not in READ:
        return method
    field, read = READ[method]
    groups = told.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    for said in (told.get(field), *(g.get(field) for g in groups if isinstance(g, Mapping))):
        if isinstance(said, str) and said not in read:
            return f"{method} {said}"
    width = bits(config)
    return f"{method} of {width} bits" if method in WORDS and width not in (None, 4, 8) else None


def unread(name: str | None, specs: Mapping[str, TensorSpec], found: Mapping[str, Parts]) -> list[Problem]:
    """A problem where a checkpoint is said to be in a format that is not read, and tensors look so.

    found: the quantised tensors in formats that are.
    """
    if name is None:
        return []
    claimed = {n for p in found.values() for n in p.stored}
    left = tuple(n for n, spec in specs.items() if n not in claimed and narrow(spec.dtype))
    if not left:
        return []
    text = f"{some(left)}: quantization_config says {name}, a format that fmoe does not decode"
    fix = "Fix: decode it with its own tool; or take quantization_config out of config.json, if it is wrong"
    return [Problem(f"{text}. {fix}", left)]


def left_alone(lists: Lists, found: Mapping[str, Parts]) -> list[Problem]:
    """A problem for each quantised tensor that a config leaves as it is: one of both is wrong."""
    made = []
    for p in found.values():
        if why := lists.alone(p.name):
            text = f"{p.codes!r} is in {p.format.name}, and quantization_config {why}"
            made.append(Problem(f"{text}. Fix: make config.json true of the tensors", (p.codes,)))
    return made


def lone(names: Names, found: Mapping[str, Parts]) -> list[Problem]:
    """A problem for each scale of activations, outside the experts, of a tensor that is not quantised."""
    scales = [n for n in names.ending((".input_scale",)) if "experts" not in n.split(".")]
    text = "{!r}: part of a quantised tensor, whose codes are not there"
    return [Problem(text.format(n), (n,)) for n in scales if n.removesuffix("input_scale") + "weight" not in found]


def narrow(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype may be codes: floats of a byte, or integers of less than 64 bits."""
    return dtype.itemsize < (2 if dtype.is_floating_point else 8) and dtype != torch.bool
