"""One layer of experts in every format: as codes, as `fmoe.load(quantized="keep")` gives them, and decoded."""

from __future__ import annotations

from functools import cache

import codec_cases
import foreign_cases
import stack_cases
import torch
from torch import Tensor

import fmoe
from fmoe.types import MoEConfig

# natively these are what another one is, and no experts that are published are in them
TWINS = {
    "fp8 qscale": "fp8 tensor",
    "mxfp8 .scale": "mxfp8",
    "gptq int4": "int4 pack zeros",
    "awq int4": "int4 pack zeros",
}
TWINS |= {"gptq_v2 int4": "int4 pack zeros", "gptq int8": "int8 pack zeros", "gptq_v2 int8": "int8 pack zeros"}
FORMATS = [name for name in fmoe.codecs.formats.FORMATS if name not in TWINS]
OWN = {fmt: case for case in codec_cases.CASES for fmt in case[1:]}
D, I = 128, 128
E = codec_cases.E


@cache
def layer(fmt: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor], MoEConfig]:
    """(codes and their scales, the same decoded to dtype, config), under the names of `fmoe.experts`."""
    if fmt in OWN:
        family, config = OWN[fmt][0], codec_cases.config(OWN[fmt][0], D, I)
        _, hf = codec_cases.made(OWN[fmt], D, I)
    elif fmt in stack_cases.FAMILIES:
        family = stack_cases.FAMILIES[fmt][-1]  # whose codes lie as decoding lays numbers: products round alike
        config, hf, _ = stack_cases.checkpoint(family, fmt)
    else:
        family, (config, hf, _) = "qwen3_moe", foreign_cases.checkpoint("qwen3_moe", fmt)
        config |= {"hidden_act": "silu"}
    natives = []
    wide = torch.float32 if fmoe.codecs.formats.FORMATS[fmt].zeros else dtype  # bf16 has no way back to some of these
    for how in (dict(quantized="keep"), dict(dtype=wide)):
        adapter = fmoe.adapter(family, config, **how)
        native = adapter.from_hf(hf)
        prefix = next(n for n in native if n.endswith(".gate_and_up_projs")).rpartition(".")[0]
        natives.append(fmoe.subtree(native, prefix))
    natives[1] = {n: t.to(dtype) if n.endswith("_projs") else t for n, t in natives[1].items()}
    natives[0] |= {n: t for n, t in natives[1].items() if n.endswith("bias")}  # cast alike
    return natives[0], {n: t for n, t in natives[1].items() if "_scale" not in n}, adapter.moe_config


def tokens(config: MoEConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, fmoe.Routing]:
    """x [6, D] and a routing that leaves expert 1 idle, masks a token and has a slot that goes nowhere."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(6, config.dim, generator=drawn) / 64
    indices = torch.tensor([[0, 2], [2, 0], [0, -1], [2, 0], [0, 2], [2, 0]])
    mask = torch.tensor([True] * 4 + [False, True])
    return x.to(dtype), fmoe.Routing(indices, torch.rand(6, 2, generator=drawn), mask)


def results(params: dict[str, Tensor], x: Tensor, routing: fmoe.Routing, config: MoEConfig, **how) -> dict[str, Tensor]:
    """y, and the gradients of what has any: x, routing weights and all parameters but the weights."""
    train = {n: p.detach().clone().requires_grad_() for n, p in params.items() if "bias" in n or "lora" in n}
    x, weights = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
    y = fmoe.experts(params | train, x, routing._replace(weights=weights), config, **how)
    (y.float() * torch.arange(y.shape[1]).cos()).sum().backward()
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | {n: p.grad for n, p in train.items()}


def lora(config: MoEConfig, r: int = 4) -> dict[str, Tensor]:
    n, d, i = config.n_routed_experts, config.dim, config.moe_inter_dim
    shapes = {"gate_and_up_A": (n, d, r), "gate_and_up_B": (n, r, 2 * i), "down_A": (n, i, r), "down_B": (n, r, d)}
    drawn = torch.Generator().manual_seed(2)
    return {f"lora_{part}": 0.1 * torch.randn(s, generator=drawn) for part, s in shapes.items()}
