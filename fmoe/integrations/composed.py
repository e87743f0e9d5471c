"""An expert around a function that is not ours: our products, their activation between them, their norm after them."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fmoe.backends import HAS_TRITON, Backend
from fmoe.backends.raw import RAW
from fmoe.dispatch import Rows, local
from fmoe.dispatch.watched import untraced
from fmoe.integrations.gates import Gate
from fmoe.layer.checks import AXES, check_experts, check_tokens
from fmoe.layer.experts import autocast_on, experts, without_autocast
from fmoe.types import MoEConfig, Params, Routing

Apply = Callable[[Tensor], Tensor]


def layer(
    params: Params,
    x: Tensor,
    routing: Routing,
    gate: Gate,
    *,
    backend: str | Backend | None = None,
    apply: Apply | None = None,
    after: Apply | None = None,
    ups: Sequence[str] = ("gate_and_up_projs",),
) -> Tensor:
    """`fmoe.experts(params, x, routing)` with the sizes of params, lora_alpha = r, and the activation of a gate.

    apply: act of a gate that is `own`; after: a function of each expert's output, before it is weighted. ups: the names
    of what makes u, side by side. With any of these, products are those of the backend loop, torch_mm or triton.
    """
    untraced("experts")  # before sizes are read, which that tracer makes tensors of
    E, I, D = params["down_projs"].shape
    K = min(routing.indices.shape[1], E)  # on a rank that has fewer experts than a token goes to
    made = _config.__wrapped__ if torch.compiler.is_compiling() else _config
    config = made(E, max(K, 1), D, I, x.dtype, "down_proj_bias" in params, gate)
    if not gate.own and after is None and len(ups) == 1:
        r = next((p.shape[-1] for name, p in params.items() if name.startswith("lora_") and name.endswith("_A")), 1)
        return experts(params, x, routing, config, backend=backend, lora_alpha=float(r))
    if apply is None:
        raise ValueError("layer: a gate that is its module's own needs `apply`")
    axes = AXES if len(ups) == 1 else dict.fromkeys(ups, "E D I") | {n: a for n, a in AXES.items() if "U" not in a}
    check_tokens(x, routing, config)
    U = sum(int(params[name].shape[-1]) for name in ups)  # what a function of its own makes I of
    check_experts(params, config, x.device, n_experts=E, axes=axes, U=U)
    by = products(backend, x)

    cast = autocast_on(x.device)
    h = x if cast is None or x.dtype == torch.float64 else x.to(cast)
    with without_autocast(x.device):
        plan = local.plan(routing, config)
        rows = local.dispatch(h, routing.weights, plan)
        return local.combine(_mlp(params, rows, ups, apply, after, by), plan).to(x.dtype)


@lru_cache(maxsize=256)
def _config(E: int, K: int, D: int, I: int, dtype: torch.dtype, bias: bool, gate: Gate) -> MoEConfig:
    sizes: dict[str, Any] = dict(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)
    return MoEConfig(**sizes, dtype=dtype, expert_bias=bias, **gate.fields())


def products(backend: str | Backend | None, x: Tensor) -> str:
    """The name in `RAW` of who multiplies for a backend. Raises ValueError for one that has no products of its own."""
    name = ("triton" if x.is_cuda and HAS_TRITON else "torch_mm") if backend is None else backend
    if name not in RAW:
        told = repr(name) if isinstance(name, str) else getattr(name, "__name__", "a function")
        raise ValueError(
            f"backend is {told}: these experts have a function of their own between the products, or after them,"
            f" which only {', '.join(RAW)} leave room for"
        )
    return "loop" if x.dtype == torch.float64 else str(name)


def _mlp(params: Params, rows: Rows, ups: Sequence[str], apply: Apply, after: Apply | None, by: str) -> Tensor:
    from fmoe.backends.products import gmm  # on first use: it needs torch._dynamo

    x, w, offsets = rows.x, rows.weights[:, None], rows.counts.cumsum(0).int()
    ones = x.new_ones(x.shape[0], 1)
    # rows that go nowhere, where the host cannot know how many do, come last, and what products make of them is left
    unrouted = torch.arange(x.shape[0], device=x.device)[:, None] >= offsets[-1]

    def project(h: Tensor, weight: str, bias: str, lora: str) -> Tensor:
        product = lambda h, name: gmm(h, params[name], offsets, by)
        out = product(h, weight)
        if f"{lora}_A" in params:
            out = out + product(product(h, f"{lora}_A"), f"{lora}_B")
        if bias in params:
            out = out + gmm(ones, params[bias].to(x.dtype)[:, None], offsets, by)
        return out.masked_fill(unrouted, 0)

    u = torch.cat([project(x, name, "gate_up_proj_bias", "lora_gate_and_up") for name in ups], -1)
    out = project(apply(u).to(x.dtype), "down_projs", "down_proj_bias", "lora_down")
    return w * (out if after is None else after(out)).to(w.dtype)
