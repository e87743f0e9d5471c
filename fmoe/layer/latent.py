"""What stands around experts that work in a latent width: two projections, and the norm that some families have."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fmoe.routing.gate import rms_norm
from fmoe.shapes import said
from fmoe.types import MoEConfig, Params

LATENT = {
    "fc1_latent_proj": "routed_expert_down_proj",
    "fc2_latent_proj": "routed_expert_up_proj",
    "latent_norm": "routed_expert_norm",
}
"""What stands around experts in a latent width, and Kimi-K3's names for it."""

Linear = Callable[[Tensor], Tensor]


def around(params: Params, config: MoEConfig, linear: Callable[[str, Tensor], Tensor]) -> tuple[Linear, Linear]:
    """(into the latent width, out of it), with the norm where config has it. linear(name, x): a projection by name."""
    name = _latent_names(params)
    fc1, fc2 = (partial(linear, name[proj]) for proj in ("fc1_latent_proj", "fc2_latent_proj"))
    if not (at := said(config, "latent_norm")):
        return fc1, fc2
    norm = partial(latent_norm, params[f"{name['latent_norm']}.weight"], config)
    return (lambda x: norm(fc1(x)), fc2) if at == "before" else (fc1, lambda y: fc2(norm(y)))


def latent_norm(weight: Tensor, config: MoEConfig, x: Tensor) -> Tensor:
    """The RMS norm of x [T, L] times weight [L] + config.norm_offset."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return rms_norm(x, wide + config.norm_offset, config.norm_eps)


def _latent_names(params: Params) -> dict[str, str]:
    return {ours: theirs if f"{theirs}.weight" in params else ours for ours, theirs in LATENT.items()}


def latent_axes(params: Params, config: MoEConfig) -> dict[str, str]:
    """The names of these parameters, as they are there, and the letters of their axes."""
    axes = ["L D", "D L", "L"] if said(config, "latent_norm") else ["L D", "D L"] if config.moe_latent_size else []
    return {f"{name}.weight": a for name, a in zip(_latent_names(params).values(), axes, strict=False)}
