"""One small layer for Transformer Engine's simulator, and what it took."""

from dataclasses import replace
from typing import Any

import naive
import torch
from torch import Tensor

from fmoe import MoEConfig, experts

CONFIG = MoEConfig(
    n_routed_experts=5, n_activated_experts=3, dim=16, moe_inter_dim=16, expert_bias=True, dtype="float32"
)
AFTER = replace(CONFIG, apply_router_weight_after_down=True)


def inputs(config: MoEConfig = CONFIG, lora: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    params = naive.draw(config, dtype)
    if lora:
        E, D, I = config.n_routed_experts, config.dim, config.moe_inter_dim
        for part, (i, o) in {"gate_and_up": (D, params["gate_and_up_projs"].shape[2]), "down": (I, D)}.items():
            noise = torch.Generator().manual_seed(i + o)
            params[f"lora_{part}_A"] = torch.randn(E, i, 2, generator=noise)
            params[f"lora_{part}_B"] = torch.randn(E, 2, o, generator=noise) * 0.02
    x, routing = naive.tokens(config, dtype=dtype)
    return params, x, routing._replace(weights=routing.weights.float())


def same(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name in right:
        assert not found[name].isnan().any(), name
        naive.near(found[name], right[name], tolerance)


def taken(config: MoEConfig, backend: Any, lora: bool = False, change: Any = None, **how: Any) -> dict[str, Tensor]:
    params, x, routing = inputs(config, lora)
    x, routing = change(x, routing) if change else (x, routing)
    y, grads = naive.grads_of(experts, params, x, routing, config=config, backend=backend, **how)
    return {"y": y, **grads}
