"""What most calls of `experts` give, found out in a tenth of the time of all the checks."""

from functools import lru_cache

import torch
from torch import Tensor

from fmoe.activations import is_gated_activation
from fmoe.dispatch.watched import PLAIN
from fmoe.shapes import said
from fmoe.types import MoEConfig, Params, Routing

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def usual(params: Params, x: Tensor, routing: Routing, config: MoEConfig) -> bool:
    """Whether these are plain tensors of one device, of this config's shapes, without codes, LoRA and a norm.

    Then no check finds anything, and none need be run. ids are int64 by now.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=3, moe_inter_dim=1, expert_activation="relu2")
    >>> params = {"gate_and_up_projs": torch.ones(2, 3, 1), "down_projs": torch.ones(2, 1, 3)}
    >>> routing = Routing(torch.tensor([[1]]), torch.ones(1, 1))
    >>> usual(params, torch.ones(1, 3), routing, config), usual(params, torch.ones(1, 4), routing, config)
    (True, False)
    """
    if (
        torch.compiler.is_compiling()
        or type(params) is not dict
        or not _plain(x)
        or said(config, "expert_norm_eps") is not None
    ):
        return False
    indices, weights, mask = routing
    where, ids, D = x.device, indices.shape if _plain(indices) else (), config.expert_dim
    if len(ids) != 2 or indices.dtype is not torch.int64 or indices.device != where:
        return False
    if not (_plain(x) and x.dtype in FLOATS and x.shape == (ids[0], D) and x.layout is torch.strided):
        return False
    if not (_plain(weights) and weights.dtype in FLOATS and weights.shape == ids and weights.device == where):
        return False
    if mask is not None and not (_plain(mask) and mask.dtype is torch.bool and mask.shape == ids[:1]):
        return False
    if mask is not None and mask.device != where:
        return False
    shapes = _shapes(config.n_routed_experts, D, config.moe_inter_dim, config.expert_activation, config.expert_bias)
    if params.keys() != shapes.keys():
        return False
    for name, p in params.items():
        if not (_plain(p) and p.shape == shapes[name] and p.dtype in FLOATS and p.device == where):
            return False
    return True


def _plain(t: Tensor) -> bool:
    return type(t) in PLAIN and not t.is_nested and t.layout is torch.strided


@lru_cache(maxsize=64)
def _shapes(E: int, D: int, I: int, activation: str, biased: bool) -> dict[str, tuple[int, ...]]:
    U = 2 * I if is_gated_activation(activation) else I
    shapes: dict[str, tuple[int, ...]] = {"gate_and_up_projs": (E, D, U), "down_projs": (E, I, D)}
    return shapes | ({"gate_up_proj_bias": (E, U), "down_proj_bias": (E, D)} if biased else {})
