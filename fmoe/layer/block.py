"""A whole Mixture-of-Experts block: router, experts, shared experts, and the latent projections around the experts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.activations import activation, is_gated_activation
from fmoe.backends import Backend
from fmoe.codecs.stacks import is_code, packed, suffix_of
from fmoe.dispatch import Dispatcher
from fmoe.dispatch.local import local
from fmoe.folding import meant
from fmoe.layer.checks import as_routing
from fmoe.layer.experts import experts
from fmoe.layer.latent import around, latent_axes
from fmoe.routing import count, routed_of, routing_of
from fmoe.routing.gate import WEIGHTS, logits_of
from fmoe.routing.usage import slots
from fmoe.shapes import (
    all_tensors,
    check_config,
    check_level,
    check_params,
    computed_with,
    in_shape,
    n_ranked,
    odd,
    said,
)
from fmoe.types import MoEConfig, Params, Routed, Routing

SHARED_ACTIVATIONS = ("swiglu", "relu2", "swigluoai", "situ")
BESIDE = ("gate.weight", "experts.gate_and_up_projs", "experts.down_projs")
Linear = Callable[[Tensor], Tensor]


def moe(
    params: Params,
    x: Tensor,
    config: MoEConfig,
    *,
    backend: str | Backend | None = None,
    dispatcher: Dispatcher = local,
    mask: Tensor | None = None,
    recompute: bool = False,
    lora_alpha: float = 32.0,
    routing: Routing | tuple[Tensor | None, ...] | None = None,
    indices: Tensor | None = None,
    return_routed: bool = False,
) -> Any:
    """y = fc2(experts(fc1(x), route(x))) + zero experts + sigmoid(shared_expert_gate(x)) * shared_experts(x).

    Only `gate` and `experts` have to be there; what is not drops out of the sentence. x [.., D], y alike. mask bool
    [..]: experts see no token whose mask is False, shared experts see all. params, named relative to the block:
    `gate.*` as in `route`; `experts.*` as in `experts`; `shared_experts.gate_proj`, `.up_proj` [S, D] and `.down_proj`
    [D, S] (no gate_proj for relu2); `shared_expert_gate` [1, D]; `fc1_latent_proj` [L, D] and `fc2_latent_proj`
    [D, L] if `config.moe_latent_size` is L, with `latent_norm` [L] where `config.latent_norm` says (Kimi-K3's names
    `routed_expert_down_proj`, `_up_proj` and `_norm` are taken too). Each of these projections is a `.weight` and where
    present a `.bias`. A token's choices among `config.n_zero_experts` add weight * x. `config.output_scale` multiplies
    the sum where there are shared experts.
    backend, dispatcher, recompute and lora_alpha are those of `experts`.

    indices [.., K]: experts that were chosen before, weighted by this gate, as in `route` (router replay). routing: a
    whole Routing from outside, of all tokens in a row; the gate is not asked, and need not be there. return_routed:
    (y, Routed) comes back, with what `fmoe.losses` asks for, the gate's logits and scores also where the routing came
    from outside. Losses are the caller's: `config.aux_loss_coeff`, `gate_bias_update_factor` and `input_jitter` are
    honoured by `fmoe.nn.MoE`, which trains.

    Raises ValueError for unknown, missing and misshapen parameters, for a routing and indices at once, and as `route`
    and `experts`.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> params = {
    ...     "gate.weight": torch.tensor([[1.0], [-1.0]]),
    ...     "experts.gate_and_up_projs": torch.tensor([[[1.0]], [[-1.0]]]),
    ...     "experts.down_projs": torch.ones(2, 1, 1),
    ... }
    >>> moe(params, torch.tensor([[[3.0], [-2.0]]]), config)
    tensor([[[9.],
             [4.]]])
    """
    check_config("moe", config)
    computed_with("moe", "x", x)
    check_level("moe", params, ("experts.gate_and_up_projs", "experts.down_projs", *WEIGHTS))
    _check(params, config, x.device)
    held = partial(_linear, params)
    below = _below(params, "experts.")

    def gate(x: Tensor, indices: Tensor | None, mask: Tensor | None) -> Routing | Routed:
        logits, correction, scale = logits_of(params, x, config, indices, None)  # what is masked is zeros by now
        if return_routed:
            return routed_of(logits, x.dtype, config, correction, indices, mask, scale)
        return routing_of(logits, x.dtype, config, correction, indices, scale)._replace(mask=mask)

    how: Any = dict(backend=backend, dispatcher=dispatcher, recompute=recompute, lora_alpha=lora_alpha)
    return block(
        x,
        config,
        mask,
        route=gate,
        experts=lambda x, routing: experts(below, x, routing, config, **how),
        shared=(lambda x: shared(x, config, held)) if "shared_experts.up_proj.weight" in params else None,
        shared_gate=partial(held, "shared_expert_gate") if "shared_expert_gate.weight" in params else None,
        latent=around(params, config, held) if config.moe_latent_size else None,
        routing=routing,
        indices=indices,
        return_routed=return_routed,
    )


def block(
    x: Tensor,
    config: MoEConfig,
    mask: Tensor | None,
    *,
    route: Callable[[Tensor, Tensor | None, Tensor | None], Routing | Routed],
    experts: Callable[[Tensor, Routing], Tensor],
    shared: Linear | None = None,
    shared_gate: Linear | None = None,
    latent: tuple[Linear, Linear] | None = None,
    routing: Routing | tuple[Tensor | None, ...] | None = None,
    indices: Tensor | None = None,
    return_routed: bool = False,
) -> Any:
    """The sentence of `moe`, of its parts: functions of rows, which `moe` takes from params and `fmoe.nn.MoE` has.

    route(x [T, D], indices, mask): a Routing, or where return_routed a Routed.
    """
    _check_tokens(x, config, mask)
    if indices is not None:
        all_tensors("moe", {"indices": indices}, "")
        if indices.ndim < 2:
            raise ValueError(f"moe: indices are {list(indices.shape)}, expected [.., K={config.n_activated_experts}]")
    if routing is not None and indices is not None:
        raise ValueError("moe: a routing and indices are given, expected one of them: a routing has its indices")
    tokens, mask = x.reshape(-1, config.dim), None if mask is None else mask.flatten()
    # rows that no expert may see are zeroed here, lest a NaN in them reaches the gradient of the router
    seen = tokens if mask is None else tokens.masked_fill(~mask[:, None], 0)
    flat = None if indices is None else indices.flatten(0, -2)
    found = route(seen, flat, mask) if routing is None or return_routed else as_routing(routing)
    if routing is not None:
        found = _from_outside(routing, found, mask, config)
    fc1, fc2 = latent or (_same, _same)
    where = found.routing if isinstance(found, Routed) else found
    y = fc2(experts(fc1(seen), where))
    if said(config, "n_zero_experts"):
        y = y + _returned(seen, where, config)
    if shared is not None:
        own = shared(tokens)
        y = y + (own if shared_gate is None else torch.sigmoid(shared_gate(tokens)) * own)
        y = y if (factor := said(config, "output_scale")) == 1 else factor * y
    y = in_shape(y, x.shape)
    return (y, found) if return_routed else y


def _from_outside(
    routing: tuple[Tensor | None, ...], found: Routing | Routed, mask: Tensor | None, config: MoEConfig
) -> Routing | Routed:
    """The routing instead of the gate's own, its tokens masked where either mask says so."""
    given = as_routing(routing)
    own = given.mask if mask is None else mask if given.mask is None else given.mask & mask
    given = Routing(given.indices.flatten(0, -2), given.weights.flatten(0, -2), own)
    if not isinstance(found, Routed):
        return given
    return found._replace(routing=given, counts=count(given, n_ranked(config)))


def _returned(x: Tensor, routing: Routing, config: MoEConfig) -> Tensor:
    """x times the weights of its slots at zero experts."""
    ids, gone = slots(routing, n_ranked(config))
    weights = routing.weights.masked_fill(gone | (ids < config.n_routed_experts), 0)
    return (x * weights.sum(-1, keepdim=True)).to(x.dtype)


def shared(x: Tensor, config: MoEConfig, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
    """down_proj(act([gate_proj(x), up_proj(x)])); linear(name, x): the projection of a name."""
    name = config.shared_expert_activation
    parts = ("gate_proj", "up_proj") if is_gated_activation(name) else ("up_proj",)
    u = torch.cat([linear(f"shared_experts.{part}", x) for part in parts], -1)
    limit = config.swiglu_limit if config.shared_swiglu_limit is None else config.shared_swiglu_limit
    act = activation(replace(config, expert_activation=name, swiglu_limit=limit))
    return linear("shared_experts.down_proj", act(u, None))


def _same(x: Tensor) -> Tensor:
    return x


def _linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x @ weight^T + bias in x's dtype."""
    bias, weight = params.get(f"{name}.bias"), params[f"{name}.weight"]
    if is_code(weight):
        from fmoe.backends.coded import linear  # on first use: it needs torch._dynamo, which takes a second

        return linear(x, params, f"{name}.weight") + (0 if bias is None else bias.to(x.dtype))
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _below(params: Params, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}


def _check_tokens(x: Tensor, config: MoEConfig, mask: Tensor | None) -> None:
    computed_with("moe", "x", x)
    all_tensors("moe", {} if mask is None else {"mask": mask}, "")
    if x.ndim < 1 or x.shape[-1] != config.dim:
        raise ValueError(f"moe: x has shape {list(x.shape)}, expected [.., D={config.dim}]")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(f"moe: mask is {mask.dtype} {list(mask.shape)}, expected torch.bool {list(x.shape[:-1])}")
    if mask is not None and (strange := odd({"mask": mask}, x.device)):
        raise ValueError(f"moe: {strange[0]}")


def _check(params: Params, config: MoEConfig, where: torch.device) -> None:
    rest = {name: p for name, p in params.items() if not name.startswith(("gate.", "experts."))}
    all_tensors("moe", rest)
    weights = latent_axes(rest, config) | _shared_axes(rest, config)
    biases = {n.removesuffix("weight") + "bias": axes.split()[0] for n, axes in weights.items() if " " in axes}
    gate = () if config.shared_expert_gate else ("shared_expert_gate.weight",)
    width = (config.n_shared_experts or 1) * (config.shared_expert_inter_dim or config.moe_inter_dim)
    up = rest.get("shared_experts.up_proj.weight")
    sizes = dict(D=config.dim, L=config.expert_dim, S=width if up is None else up.shape[0])
    said = {}
    for n in (n for n in weights if n in rest and is_code(rest[n])):
        if (suffix := suffix_of(n, rest)) is not None:
            said[n] = [rest[n].shape[0], rest[n].shape[-1] * packed(suffix, rest[n].dtype)]
            if rest[n].requires_grad:
                raise ValueError(f"moe: parameter {n!r} is codes and requires a gradient, expected it frozen")
    optional = (*biases, *gate)
    check_params("moe", rest, weights | biases, sizes, where=where, optional=optional, coded=said, beside=BESIDE)


def _shared_axes(params: Params, config: MoEConfig) -> dict[str, str]:
    if not config.n_shared_experts and not any(name.startswith("shared_expert") for name in params):
        return {}
    name = config.shared_expert_activation
    if name not in SHARED_ACTIVATIONS:
        told = f"{', '.join(SHARED_ACTIVATIONS)}{meant(name, SHARED_ACTIVATIONS)}"
        raise ValueError(f"shared_expert_activation is {name!r}, expected one of {told}")
    gate = {"shared_experts.gate_proj.weight": "S D"} if is_gated_activation(name) else {}
    others = {"shared_experts.up_proj.weight": "S D", "shared_experts.down_proj.weight": "D S"}
    return gate | others | {"shared_expert_gate.weight": "1 D"}
