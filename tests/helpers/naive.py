"""Experts token by token in fp64, from the formulas of the specification: shares no code with fmoe.

Plain arithmetic on tensors, so that it also gives reference gradients. And what tests of experts are made of: random
parameters, tokens with every oddity of a routing, and all gradients of a function like `experts`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmoe.types import MoEConfig, Routing


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def gelu_tanh(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def act(u: Tensor, config: MoEConfig) -> Tensor:
    """act(u) for u [U] fp64, without weight."""
    name, L, alpha = config.expert_activation, config.activation_limit, config.activation_alpha
    if name == "relu2":
        return torch.where(u > 0, u * u, 0 * u)
    half = len(u) // 2
    g, v = (u[0::2], u[1::2]) if name == "quick_geglu" else (u[:half], u[half:])
    if name == "swiglu" and config.swiglu_limit > 0:
        g, v = g.clamp(max=config.swiglu_limit), v.clamp(-config.swiglu_limit, config.swiglu_limit)
    if name == "quick_geglu" or (name == "swigluoai" and L > 0):
        g, v = g.clamp(max=L), v.clamp(-L, L)
    if name == "swiglu":
        return g * sigmoid(g) * v
    if name == "geglu":
        return gelu_tanh(g) * v
    if name == "situ":
        return alpha * torch.tanh(g / alpha) * sigmoid(g) * (L * torch.tanh(v / L) if L > 0 else v)
    return g * sigmoid(alpha * g) * (v + 1)


def experts(params: dict[str, Tensor], x: Tensor, routing: Routing, config: MoEConfig) -> Tensor:
    """y [T, D] in fp64; in exact arithmetic both weighting modes are this one formula."""
    p = {name: tensor.double() for name, tensor in params.items()}
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(x.shape[1], dtype=torch.float64)
        for k in range(routing.indices.shape[1]):
            e = int(routing.indices[t, k])
            if not 0 <= e < config.n_routed_experts or (routing.mask is not None and not routing.mask[t]):
                continue
            u = x[t].double() @ p["gate_and_up_projs"][e]
            u = u + p["gate_up_proj_bias"][e] if "gate_up_proj_bias" in p else u
            out = act(u, config) @ p["down_projs"][e]
            out = out + p["down_proj_bias"][e] if "down_proj_bias" in p else out
            y = y + routing.weights[t, k].double() * out
        rows.append(y)
    return torch.stack(rows) if rows else x.double() * 1


def draw(config: MoEConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    E, D, I = config.n_routed_experts, config.expert_dim, config.moe_inter_dim
    U = 2 * I if config.expert_activation != "relu2" else I
    shapes: dict[str, tuple[int, ...]] = {"gate_and_up_projs": (E, D, U), "down_projs": (E, I, D)}
    if config.expert_bias:
        shapes |= {"gate_up_proj_bias": (E, U), "down_proj_bias": (E, D)}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.6 * torch.randn(s, dtype=torch.float64, generator=generator)).to(dtype) for name, s in shapes.items()
    }


def tokens(config: MoEConfig, T: int = 9, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Routing]:
    """x and a routing with masked tokens, ids -1 and E + 100, a repeated expert, and an expert without tokens."""
    generator = torch.Generator().manual_seed(seed)
    E, K = config.n_routed_experts, config.n_activated_experts
    x = torch.randn(T, config.expert_dim, dtype=torch.float64, generator=generator).to(dtype)
    indices = torch.randint(0, E - 1, (T, K), generator=generator)
    weights = torch.rand(T, K, dtype=torch.float64, generator=generator)
    mask = torch.ones(T, dtype=torch.bool)
    if T > 4:
        indices[0, 1], indices[2, 0], indices[3] = -1, E + 100, 1
        mask[4] = False
    return x, Routing(indices, weights, mask)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    off, size = float((found.double() - expected.double()).detach().norm()), float(expected.detach().double().norm())
    assert off <= tolerance * size  # a NaN fails


def grads_of(
    f: Callable[..., Tensor], params: dict[str, Tensor], x: Tensor, routing: Routing, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and the gradient of <y, fixed random> in every parameter, x and the routing weights."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    x, weights = x.detach().clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    y = f(leaves, x, routing._replace(weights=weights), **kwargs)
    r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).bfloat16()
    (y * r.to(y)).sum().backward()
    grads = {name: t.grad for name, t in {**leaves, "x": x, "weights": weights}.items() if t.grad is not None}
    assert len(grads) == len(params) + 2, f"no gradient in {set(params) - set(grads)}"
    return y.detach(), grads
