"""Experts: one pure function of a dict of tensors, a batch of tokens and a routing.

    y = combine(backend(params, dispatch(x, weights)))

Who multiplies (`backend`) and who moves tokens (`dispatcher`) are plain arguments.
"""

import torch
from torch import Tensor

from fmoe.activations import is_gated_activation
from fmoe.backends import BACKENDS, Backend
from fmoe.dispatch import Dispatcher
from fmoe.dispatch.local import local
from fmoe.shapes import check_params
from fmoe.types import MoEConfig, Params, Routing

DEFAULT_BACKEND = "loop"

AXES = {
    "gate_and_up_projs": "E D U",
    "down_projs": "E I D",
    "gate_up_proj_bias": "E U",
    "down_proj_bias": "E D",
}


def experts(
    params: Params,
    x: Tensor,
    routing: Routing,
    config: MoEConfig,
    *,
    backend: str | Backend | None = DEFAULT_BACKEND,
    dispatcher: Dispatcher = local,
) -> Tensor:
    """y[t] = sum_k (act(x[t] @ Wup[e] + bup[e]) * w[t, k]) @ Wdown[e] + w[t, k] * bdown[e], with e = indices[t, k].

    params: `gate_and_up_projs` [E, D, U], `down_projs` [E, I, D], and where present `gate_up_proj_bias` [E, U] and
    `down_proj_bias` [E, D], of any strides and dtype. x [T, D]; y [T, D] has its dtype, which is also that of the
    matrix products. Weights and sums over k are fp32 (fp64 if x is), rounded once. With
    `config.apply_router_weight_after_down` the weight multiplies the rounded output of the expert, not its activation.

    Slots with an index outside [0, E), and tokens whose mask is False, contribute nothing: not even a NaN. Parameters
    of unused experts get zero gradients. backend: a name in `BACKENDS`, a function, or None for the default.
    Raises ValueError for an unknown backend, and for parameters or tensors that do not fit the config.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> routing = Routing(torch.tensor([[1], [0], [-1]]), torch.tensor([[0.5], [1.0], [1.0]]))
    >>> experts(params, torch.tensor([[3.0], [2.0], [9.0]]), routing, config).flatten().tolist()
    [45.0, 4.0, 0.0]
    """
    multiply = _backend(backend)
    _check_tokens(x, routing, config)
    plan = dispatcher.plan(routing, config)
    rows = dispatcher.dispatch(x, routing.weights, plan)
    _check_params(params, config, n_experts=rows.counts.shape[0])
    return dispatcher.combine(multiply(params, rows, config), plan).to(x.dtype)


def _backend(backend: str | Backend | None) -> Backend:
    if callable(backend):
        return backend
    name = DEFAULT_BACKEND if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}, or a function")
    return BACKENDS[name]


def _check_tokens(x: Tensor, routing: Routing, config: MoEConfig) -> None:
    indices, weights, mask = routing
    T, D = x.shape[0] if x.ndim else 0, config.expert_dim
    fits = {
        "x": x.ndim == 2 and x.shape[1] == D and x.is_floating_point(),
        "routing.indices": indices.ndim == 2 and indices.shape[0] == T and not indices.is_floating_point(),
        "routing.weights": weights.shape == indices.shape and weights.is_floating_point(),
        "routing.mask": mask is None or (list(mask.shape) == [T] and mask.dtype == torch.bool),
    }
    found = {"x": x, "routing.indices": indices, "routing.weights": weights, "routing.mask": mask}
    expected = {
        "x": f"floating [T, D={D}]",
        "routing.indices": f"integer [T={T}, K]",
        "routing.weights": f"floating {list(indices.shape)}, the shape of routing.indices",
        "routing.mask": f"bool [T={T}]",
    }
    if wrong := [name for name, ok in fits.items() if not ok]:
        raise ValueError(
            "\n".join(f"experts: {name} is {_say(found[name])}, expected {expected[name]}" for name in wrong)
        )


def _check_params(params: Params, config: MoEConfig, *, n_experts: int) -> None:
    I = config.moe_inter_dim
    sizes = dict(E=n_experts, D=config.expert_dim, I=I, U=2 * I if is_gated_activation(config.expert_activation) else I)
    optional = () if config.expert_bias else ("gate_up_proj_bias", "down_proj_bias")
    check_params("experts", params, AXES, sizes, optional=optional)


def _say(t: Tensor | None) -> str:
    return "None" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
