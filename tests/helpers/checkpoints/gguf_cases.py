"""Tiny models in Hugging Face's files, to be written as GGUF."""

import json
from functools import cache

import torch
from safetensors.torch import save_file
from systems_zoo import model

import fmoe

KEEP = {"gpt_oss mxfp4": {"quantized": "keep"}}


def mxfp4():
    """gpt-oss with its experts, wider than in the zoo, as random blocks and scales."""
    config, hf = model("gpt_oss")
    drawn = torch.Generator().manual_seed(0)
    byte = lambda *shape: torch.randint(100, 140, shape, generator=drawn, dtype=torch.uint8)
    made = {n: t for n, t in hf.items() if not n.endswith(("gate_up_proj", "down_proj", "gate_up_proj_bias"))}
    for l in range(config["num_hidden_layers"]):
        at = f"model.layers.{l}.mlp.experts."
        made |= {at + "gate_up_proj_blocks": byte(8, 128, 1, 16), at + "gate_up_proj_scales": byte(8, 128, 1)}
        made |= {at + "down_proj_blocks": byte(8, 32, 2, 16), at + "down_proj_scales": byte(8, 32, 2)}
        made |= {at + "gate_up_proj_bias": torch.randn(8, 128, generator=drawn)}
    return config | {"intermediate_size": 64, "quantization_config": {"quant_method": "mxfp4"}}, made


@cache
def parts(name):
    """config, Hugging Face's tensors, and llama.cpp's."""
    config, hf = mxfp4() if name in KEEP else model(name)
    theirs = fmoe.adapter(config["model_type"], config, system="gguf", **KEEP.get(name, {})).from_hf(hf)
    return config, hf, {n: t.contiguous() for n, t in theirs.items()}


def saved(path, config, tensors):
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path
