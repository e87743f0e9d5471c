"""Routing weights that multiply what goes into an expert, or a norm of what comes out: around any backend."""

import torch
from torch import Tensor

from fmoe.backends import Backend
from fmoe.dispatch import Rows
from fmoe.shapes import NORM, said
from fmoe.types import MoEConfig, Params


def weighs_inside(config: MoEConfig) -> bool:
    """Whether a backend multiplies by the routing weights itself, as most families want it."""
    return not said(config, "apply_router_weight_before_up") and said(config, "expert_norm_eps") is None


def weighed_outside(multiply: Backend) -> Backend:
    """(params, rows, config) -> mlp(w x), or w * norm(mlp(x)), of a backend that is given weights of 1.

    >>> from fmoe.backends import loop
    >>> sizes = dict(n_routed_experts=1, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> config = MoEConfig(**sizes, apply_router_weight_before_up=True)
    >>> params = {"gate_and_up_projs": torch.ones(1, 1, 1), "down_projs": torch.ones(1, 1, 1)}
    >>> rows = Rows(torch.tensor([[3.0]]), torch.tensor([2.0]), torch.tensor([1]))
    >>> weighed_outside(loop)(params, rows, config)
    tensor([[36.]])
    """

    def run(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
        x, w, eps = rows.x, rows.weights[:, None], said(config, "expert_norm_eps")
        before = said(config, "apply_router_weight_before_up")
        inner = {name: p for name, p in params.items() if name != NORM}
        plain = Rows((x * w).to(x.dtype) if before else x, torch.ones_like(rows.weights), rows.counts)
        out = multiply(inner, plain, config)
        if eps is not None:
            out = out * (params[NORM].to(out.dtype) + config.norm_offset)
            out = out * (out.square().mean(-1, keepdim=True) + eps).rsqrt()
        return out if before else out * w

    return run
