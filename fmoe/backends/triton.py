"""The Triton backend: the whole layer in fused kernels, without sorted copies of the rows and without host waits.

`fused` takes tokens and a routing; `triton` takes rows that a dispatcher has sorted, and has LoRA made of products.
Both mean what `fmoe.backends.loop` means; fp64 runs in plain torch.
"""

import fmoe_kernels
import torch
from torch import Tensor

from fmoe.backends.held import WEIGHTS
from fmoe.backends.mlp import mlp
from fmoe.codecs.stacks import is_code
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params, Routing


def fused(params: Params, x: Tensor, routing: Routing, config: MoEConfig, **how: bool) -> Tensor:
    """y[t] = sum_k weights[t, k] * mlp_e(x[t]), e = indices[t, k]: the whole of `fmoe.experts`, [T, D] in x's dtype.

    how: recompute: keep x alone for backward, not the [T K, U] pre-activation; wide: y stays fp32; batch_invariant: the
    same tiles for every number of rows. Raises ValueError for LoRA parameters.
    """
    if lora := [name for name in params if name.startswith("lora_")]:
        raise ValueError(f"fused: params hold {lora[0]!r}, expected no LoRA: the backend `triton` takes it, over rows")
    return _experts(params, x, routing, config, **how)


def triton(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """out[n] = weights[n] * mlp_e(x[n]), e the expert of row n: [N, D] in the dtype of the weights."""
    lora = any(name.startswith("lora_") for name in params)
    if lora or rows.weights.dtype == torch.float64 or any(n in params and is_code(params[n]) for n in WEIGHTS):
        return mlp(params, rows, config, by="triton")
    # rows past the last expert's belong to expert E, which is dropped: the host need not know how many there are
    expert = torch.searchsorted(rows.counts.cumsum(0), torch.arange(len(rows.x), device=rows.x.device), right=True)
    routing = Routing(expert[:, None], rows.weights[:, None])
    return _experts(params, rows.x, routing, config, wide=True).to(rows.weights.dtype)


def _experts(params: Params, x: Tensor, routing: Routing, config: MoEConfig, **options: bool) -> Tensor:
    indices, weights, mask = routing
    name, alpha, limit = _activation(config)
    return fmoe_kernels.experts(
        x,
        indices,
        weights,
        mask,
        params["gate_and_up_projs"],
        params["down_projs"],
        params.get("gate_up_proj_bias"),
        params.get("down_proj_bias"),
        activation=name,
        alpha=alpha,
        limit=limit,
        weight_after_down=config.apply_router_weight_after_down,
        **options,
    )


def _activation(config: MoEConfig) -> tuple[str, float, float]:
    """(name, alpha, limit) of a config's activation, as the kernels call it."""
    name, alpha, limit = config.expert_activation, config.activation_alpha, config.activation_limit
    if name == "swiglu" and config.swiglu_limit > 0:
        return "swiglu_clamped", alpha, config.swiglu_limit
    return {"swigluoai": "swiglu_oai"}.get(name, name), alpha, limit
