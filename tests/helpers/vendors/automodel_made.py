"""In a process of its own: Automodel's published adapters, called on tensors.

python automodel_made.py GIVEN MADE    # files: {what: (model, class, config, sizes, call, tensors, how)}, results
"""

import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from nemo_automodel.components.moe.config import MoEConfig

BACKEND = SimpleNamespace(experts="torch_mm", dispatcher="torch", enable_deepep=False)


def config_of(fields: dict[str, Any]) -> Any:
    return SimpleNamespace(**{n: config_of(v) if isinstance(v, dict) else v for n, v in fields.items()})


def adapter(model: str, name: str, config: dict[str, Any], sizes: tuple[int, int, int]) -> Any:
    made = getattr(import_module(f"nemo_automodel.components.models.{model}.state_dict_adapter"), name)
    E, D, I = sizes
    moe = dict(n_routed_experts=E, n_shared_experts=0, n_activated_experts=1, dim=D, inter_dim=I, moe_inter_dim=I)
    moe |= dict(n_expert_groups=1, n_limited_groups=1, train_gate=True, gate_bias_update_factor=0.0, aux_loss_coeff=0.0)
    moe |= dict(score_func="softmax", route_scale=1.0, norm_topk_prob=True, dtype=torch.float32)
    return made(config_of(config), MoEConfig(**moe), BACKEND, torch.float32)


if __name__ == "__main__":
    found = {}
    for what, (model, name, config, sizes, call, tensors, how) in torch.load(sys.argv[1]).items():
        found[what] = dict(getattr(adapter(model, name, config, sizes), call)(tensors, **how))
    torch.save(found, sys.argv[2])
