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
    if torch.compiler.is_compiling() or type(params) is not dict or said(config, "expert_norm_eps") is not None:
        return False
    D, given, where = config.expert_dim, [x, *params.values(), *routing[: 3 - (routing.mask is None)]], None
    for t in given:
        if type(t) not in PLAIN or t.is_nested or t.layout is not torch.strided:
            return False
        where = where or t.device
        if t.device != where:
            return False
    indices, weights, mask = routing
    ids = indices.shape
    if len(ids) != 2 or indices.dtype is not torch.int64 or weights.shape != ids or x.shape != (ids[0], D):
        return False
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != ids[:1]):
        return False
    shapes = _shapes(config.n_routed_experts, D, config.moe_inter_dim, config.expert_activation, config.expert_bias)
    if params.keys() != shapes.keys() or x.dtype not in FLOATS or weights.dtype not in FLOATS:
        return False
    return all(p.shape == shapes[name] and p.dtype in FLOATS for name, p in params.items())


@lru_cache(maxsize=64)
def _shapes(E: int, D: int, I: int, activation: str, biased: bool) -> dict[str, tuple[int, ...]]:
    U = 2 * I if is_gated_activation(activation) else I
    shapes: dict[str, tuple[int, ...]] = {"gate_and_up_projs": (E, D, U), "down_projs": (E, I, D)}
    return shapes | ({"gate_up_proj_bias": (E, U), "down_proj_bias": (E, D)} if biased else {})
