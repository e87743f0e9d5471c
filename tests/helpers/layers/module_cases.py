"""Modules of drawn weights, run once: y and every gradient."""

from dataclasses import replace
from typing import Any

import naive
import torch
from dispatchers import CONFIG
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe import Routing
from fmoe.nn import GroupedExperts

NAMES = ["gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"]


def module(config: fmoe.MoEConfig = CONFIG, **how: Any) -> GroupedExperts:
    made = GroupedExperts(config, **how)
    made.load_state_dict(naive.draw(config, config.dtype))
    return made


def run(layer: torch.nn.Module, x: Tensor, routing: Routing, r: Tensor, *, again: bool = False) -> dict[str, Tensor]:
    """y and every gradient; those of DTensors in full."""
    x, w = x.detach().clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    args = (x, routing.mask, w, routing.indices)
    y = checkpoint(layer, *args, use_reentrant=False) if again else layer(*args)
    (y * r).sum().backward()
    whole = lambda g: g.full_tensor() if isinstance(g, DTensor) else g
    assert all(p.grad is not None and type(p.grad) is type(p.data) for p in layer.parameters())
    return {"y": y.detach(), "x": x.grad, "w": w.grad} | {n: whole(p.grad) for n, p in layer.named_parameters()}


BLOCKS = {
    "bare": replace(CONFIG, expert_bias=False),
    "everything": replace(
        CONFIG,
        n_shared_experts=2,
        shared_expert_gate=True,
        moe_latent_size=5,
        router_bias=True,
        score_func="sigmoid_with_bias",
        force_e_score_correction_bias=True,
    ),
    "norms": replace(CONFIG, router_norm=True, expert_norm_eps=1e-6, norm_offset=1.0),
    "relu2": replace(CONFIG, n_shared_experts=1, shared_expert_inter_dim=7, shared_expert_activation="relu2"),
}
