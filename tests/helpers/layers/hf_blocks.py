"""A block of Transformers as a function of x alone, and what `fmoe.moe` is given to compute the same.

block, params, how = alone(module, params)
block(x), fmoe.moe(params, x, config, **how)       # x [2, 9, D]
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fmoe

TOKEN_IDS = torch.arange(18).view(2, 9) * 5 % 64
"""Of the 2 x 9 tokens that blocks are compared on."""


def alone(module: nn.Module, params: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The block of a module that holds experts, its native parameters, and the further arguments of `fmoe.moe`."""
    if hasattr(module, "self_attn"):  # Gemma 4: router and experts stand in the layer
        return RoutedExperts(module.router, module.experts), params, {}
    module = copy.deepcopy(module)
    if "bias" in params:  # JetMoE adds it to the sum: it is the block's, not an expert's
        module.bias.data.zero_()
        params = {n: p for n, p in params.items() if n != "bias"}
    if hasattr(module, "post_mlp_layernorm"):  # A.X-K1: on disk, and natively, it is the layer's
        module.post_mlp_layernorm = nn.Identity()
    if type(module).__name__ in ("Llama4TextMoe", "Ernie4_5_VLMoeSparseMoeBlock"):  # tokens in a row come out
        module.register_forward_hook(lambda _, args, out: (out[0].view_as(args[0]), *out[1:]))
    if "gate.tid2eid" in params:  # DeepSeek-V4's first layers
        return Hashed(module), params, {"indices": params["gate.tid2eid"][TOKEN_IDS]}
    return module, params, {}


class RoutedExperts(nn.Module):
    """experts(x, router(x))."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = copy.deepcopy(router), copy.deepcopy(experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        _, weights, indices = self.router(flat)
        return self.experts(flat, indices, weights).view_as(x)


class Hashed(nn.Module):
    """A block that chooses experts by token id, on TOKEN_IDS."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, TOKEN_IDS)


def in_fp64(block: nn.Module) -> nn.Module:
    """The block in fp64, but for a router whose class multiplies in fp32 whatever it holds."""
    block = block.double()
    if type(getattr(block, "gate", None)).__name__ in ("Inkling2TopKRouter", "Inkling2LoopTopKRouter"):
        block.gate.float()
    return block


def assert_parity(block: nn.Module, params: dict[str, Tensor], config: fmoe.MoEConfig, width: int, **how: Any) -> None:
    x = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1))
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = block(theirs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = fmoe.moe(params, ours, config, **how)
    assert_close(found, expected)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    assert_close(*torch.autograd.grad(found, ours, cotangent), *torch.autograd.grad(expected, theirs, cotangent))
    module = fmoe.nn.MoE(replace(config, dtype="float32"))
    module.load_state_dict(params)
    assert_close(module(x, **how), found)


def assert_close(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert found.shape == expected.shape and expected.detach().norm() > 0
    assert (found - expected).detach().norm() / expected.detach().norm() < within
