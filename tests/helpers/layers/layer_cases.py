"""One small layer with LoRA matrices, its tokens, and the block around it."""

import naive
import pytest
import torch
from torch import Tensor

from fmoe import MoEConfig

ALL = ["loop", "torch_mm", "triton"]
CONFIG = MoEConfig(
    n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4, expert_bias=True, dtype=torch.float32
)
every_backend = pytest.mark.parametrize("backend", ALL)


def lora(r: int = 2) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(5)
    shapes = {"lora_down_A": (5, 4, r), "lora_down_B": (5, r, 6)}
    shapes |= {"lora_gate_and_up_A": (5, 6, r), "lora_gate_and_up_B": (5, r, 8)}
    return {name: 0.4 * torch.randn(s, generator=drawn) for name, s in shapes.items()}


PARAMS = naive.draw(CONFIG, torch.float32) | lora()
X, ROUTING = naive.tokens(CONFIG, dtype=torch.float32)
