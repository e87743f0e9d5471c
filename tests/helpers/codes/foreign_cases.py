"""Checkpoints of small sizes in every format that tools write for any family."""

from __future__ import annotations

from dataclasses import replace

import affine_cases
import torch
from codec_cases import by_hand
from torch import Tensor

from fmoe.codecs.foreign import twofold
from fmoe.codecs.formats import FOREIGN, FORMATS
from fmoe.codecs.parts import as_named

E, D, I = 3, 32, 128
NAMES = {
    "qwen3_moe": ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj"), "num_experts"),
    "deepseek_v3": ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj"), "n_routed_experts"),
    "mixtral": ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2"), "num_local_experts"),
    "deepseek_v4": ("layers.0.ffn.experts", ("w1", "w3", "w2"), "n_routed_experts"),
    "nemotron_h": ("backbone.layers.0.mixer.experts", ("up_proj", "down_proj"), "n_routed_experts"),
}
READ = [*(n for n, f in FOREIGN.items() if not f.stack), "fp8 blocks", "mxfp8", "mxfp4 packed", "int4"]


def parts(fmt: str, name: str, weight: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of a weight as a file has them, and what they say, one number after another."""
    f = FORMATS[fmt]
    if f.zeros:
        seed = int(weight.abs().max() * 1e6)
        return affine_cases.parts(fmt, name.removesuffix(".weight"), *weight.shape, group, seed)
    f = replace(f, block=(1, group)) if f.sizes == "groups" else f
    p = as_named(name, f, tuple(weight.shape))
    assert p is not None
    if p.second:
        codes, scale, second = twofold.encode(f, weight)
        shaped = {p.second[0]: second.reshape(p.kept[1][2])}
        both = scale.float() / second if f.divides else scale.float() * second
    else:
        (codes, scale), shaped = f.encode(weight), {}
        both = scale
    made = {p.codes: codes, p.scale: scale.reshape(f.spelled(tuple(scale.shape)))} | shaped
    made |= {p.extent: torch.tensor(weight.shape)} if p.extent else {}
    return made, by_hand(f, codes, both)


def checkpoint(family: str, fmt: str, group: int = 32) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    group = 16 if fmt == "fp8 side groups" else group  # one group a row is one a channel
    stem, names, counted = NAMES[family]
    config = dict(model_type=family, hidden_size=D, moe_intermediate_size=I, num_hidden_layers=1, num_experts_per_tok=1)
    config |= {counted: E, "intermediate_size": I, "torch_dtype": "float32", "mlp_hidden_act": "relu2"}
    told = {"group_0": {"weights": {"num_bits": 8 if "int8" in fmt else 4}}}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": told}
    if FORMATS[fmt].zeros:
        config["quantization_config"] = affine_cases.config_of(fmt, group)
    hf, said = {}, {}
    for e in range(E):
        for n in names:
            weight = torch.randn((D, I) if n in ("down_proj", "w2") else (I, D)) * (1 + e)
            made, said[f"{e}.{n}"] = parts(fmt, f"{stem}.{e}.{n}.weight", weight, group)
            hf |= made
            if e != 1:  # calibration has never reached it
                hf[f"{stem}.{e}.{n}.input_scale"] = torch.tensor(0.5)
    return config, hf, said
