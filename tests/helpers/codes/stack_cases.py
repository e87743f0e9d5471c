"""Stacks of experts in codes with stacks of scales, as ModelOpt, Inkling and compressed-tensors write them."""

from __future__ import annotations

from typing import Any

import torch
from codec_cases import by_hand
from torch import Tensor

from fmoe.codecs.foreign import twofold
from fmoe.codecs.formats import FORMATS
from fmoe.codecs.parts import as_named
from fmoe.families import family

E, D, I = 3, 128, 128
STACKS = [n for n, f in FORMATS.items() if f.stack]
TURNED = ("llama4_text", "gpt_oss")
# a format -> families that hold such stacks, the first one published
FAMILIES = {name: ("inkling2_text",) for name in STACKS} | {
    "nvfp4 stack": ("llama4_text", "gpt_oss"),
    "mxfp8 stack side": ("llama4_text", "qwen3_5_moe"),
    "mxfp4 stack side": ("qwen3_5_moe",),
    "fp8 stack experts": ("llama4_text", "gpt_oss", "qwen3_5_moe"),
    "fp8 stack tensor": ("llama4_text", "gpt_oss", "qwen3_5_moe"),
}
PAIRS = [(name, family) for name in STACKS for family in FAMILIES[name]]


def checkpoint(model_type: str, fmt: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(config, the tensors of a file, what gate_and_up and down say one number after another, as the file lies)"""
    torch.manual_seed(0)
    fields, f = family(model_type).fields, FORMATS[fmt]
    sizes = dict(n_routed_experts=E, n_activated_experts=2, dim=D, moe_inter_dim=I)
    config = {"model_type": model_type, "torch_dtype": "float32"} | {fields[n].split()[0]: s for n, s in sizes.items()}
    if f.method:
        config["quantization_config"] = {"quant_method": f.method.partition(" ")[0]}
    block = "model.layers.0." + ("feed_forward.experts." if model_type == "llama4_text" else "mlp.experts.")
    names = ("w13_weight", "w2_weight") if model_type.startswith("inkling") else ("gate_up_proj", "down_proj")
    hf, said = {}, {}
    for name, shape in zip(names, ((E, 2 * I, D), (E, D, I)), strict=True):
        weight = torch.randn(shape) * torch.tensor([1.0, 3.0, 0.2]).view(-1, 1, 1)
        weight = weight.mT.contiguous() if model_type in TURNED else weight
        made, said[name] = parts(fmt, block + name, weight)
        hf |= made | ({f"{block}{name}_input_scale": torch.tensor(0.5)} if "{X}_input_scale" in f.activation else {})
    if model_type == "gpt_oss":
        hf |= {f"{block}{n}_bias": torch.randn(E, s) for n, s in (("gate_up_proj", 2 * I), ("down_proj", D))}
    if fmt == "nvfp4 stack .scale":
        hf |= {f"{block}w13_weight.{p}": t for p, t in (("original_shape", torch.tensor([E, 2 * I, D])),
                                                       ("input_amax", torch.tensor([3.0])))}  # fmt: skip
    return config, hf, said


def parts(fmt: str, name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    f, p = FORMATS[fmt], as_named(name, FORMATS[fmt], tuple(weight.shape))
    assert p is not None
    if not p.second:
        codes, scale = f.encode(weight)
        return {p.codes: codes, p.scale: scale}, by_hand(f, codes, scale)
    codes, scale, second = twofold.encode(f, weight)
    made = {p.codes: codes, p.scale: scale, p.second[0]: second}
    factor = second.double().expand(len(weight)).view(-1, 1, 1)
    if p.third:
        made[p.third[0]] = twofold.third(second)
        factor = factor / made[p.third[0]].double()
    turn = lambda t: t.mT.contiguous() if f.across else t
    return made, turn(by_hand(f.along, turn(codes), turn(scale).double() * factor))
