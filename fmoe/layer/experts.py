"""Experts: one pure function of a dict of tensors, a batch of tokens and a routing.

    y = combine(backend(params, dispatch(x, weights)))

Who multiplies (`backend`) and who moves tokens (`dispatcher`) are plain arguments.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fmoe.backends import BACKENDS, Backend, Fused, find, takes_codes
from fmoe.backends.direct import direct
from fmoe.backends.held import in_codes
from fmoe.dispatch import Dispatcher
from fmoe.dispatch.local import local
from fmoe.dispatch.watched import at_most_recorded, recorded, untraced
from fmoe.layer.checks import PAIRS, as_routing, check_experts, check_made, check_tokens
from fmoe.layer.coded import by_expert
from fmoe.layer.invariant import one_by_one
from fmoe.layer.outside import weighed_outside, weighs_inside
from fmoe.layer.recompute import recompute as again
from fmoe.layer.usual import usual
from fmoe.shapes import check_config, check_level
from fmoe.types import MoEConfig, Params, Routing

HERE = (BACKENDS["loop"], BACKENDS["torch_mm"])  # on a CPU, one and the same
OURS = {*BACKENDS.values()}
NOTHING = nullcontext()


def experts(
    params: Params,
    x: Tensor,
    routing: Routing | tuple[Tensor | None, ...],
    config: MoEConfig,
    *,
    backend: str | Backend | None = None,
    dispatcher: Dispatcher = local,
    recompute: bool = False,
    lora_alpha: float = 32.0,
    batch_invariant: bool = False,
) -> Tensor:
    """y[t] = sum_k (act(x[t] @ Wup[e] + bup[e]) * w[t, k]) @ Wdown[e] + w[t, k] * bdown[e], with e = indices[t, k].

    params: `gate_and_up_projs` [E, D, U], `down_projs` [E, I, D], and where present `gate_up_proj_bias` [E, U] and
    `down_proj_bias` [E, D], of any strides and dtype. x [T, D]; y [T, D] has its dtype, which is also that of the
    matrix products. Weights and sums over k are fp32 (fp64 if x is), rounded once. With
    `config.apply_router_weight_after_down` the weight multiplies the rounded output of the expert, not its activation,
    with `apply_router_weight_before_up` its rounded input. With `config.expert_norm_eps` it multiplies the RMS norm of
    that output times `post_expert_norm.weight` [D] + config.norm_offset: a norm of the product, not a factor of a norm.
    In fp16 a weight above 1 multiplies an activation by what is left of a power of two, and that multiplies y: so
    what weights make too large for fp16 is y alone.

    Codes: either weight may be codes [E, D / packed, U], [E, I / packed, D] with their scales beside it, as
    `fmoe.load(quantized="keep")` gives them, in every format of `fmoe.codecs.formats.FORMATS`. Only experts that have
    rows are decoded, one at a time, to the dtype of the products, and again for backward; bit for bit what decoding all
    first gives. Codes and scales have no gradient: LoRA beside them has. Scales of activations are not looked at.

    LoRA: with `lora_gate_and_up_A` [E, D, r], `_B` [E, r, U], `lora_down_A` [E, I, r], `_B` [E, r, D] (either pair or
    both) each h @ W is h @ W + lora_alpha / r * (h @ A) @ B.

    routing: a Routing, or a tuple (indices, weights) or (indices, weights, mask). Slots with an index outside [0, E),
    and tokens whose mask is False, contribute nothing: not even a NaN. Parameters of unused experts get zero
    gradients, and no gradient is computed for a parameter that needs none. Every order of derivatives exists (with
    triton the first; the next raises NotImplementedError), and runs repeat bit for bit.

    Autocast: products are taken in autocast's dtype, as those of `torch.nn.functional.linear` are (fp64 stays);
    everything else, the dtype of y included, is as without. backend: a name in `fmoe.backends.NAMES`, a function, or
    None: triton on a GPU, otherwise torch_mm. recompute: keep the arguments alone for backward, no row of them.
    batch_invariant: the result of a token does not depend on its neighbours, bit for bit, nor on their number. Triton's
    fused kernels take the same tiles for every number of rows; all else multiplies one row at a time, which is slow.

    All arguments on `meta`, or fake tensors: nothing is computed, shapes and dtypes come out (so one learns memory, and
    with `torch.utils.flop_counter` the cost). As no routing can be read there, each slot counts as one row.

    Raises ValueError for an unknown backend, for parameters or tensors that do not fit the config, for codes that
    require a gradient or lack scales, and under torch.jit.trace; ImportError for a backend whose library is not
    installed.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> routing = Routing(torch.tensor([[1], [0], [-1]]), torch.tensor([[0.5], [1.0], [1.0]]))
    >>> experts(params, torch.tensor([[3.0], [2.0], [9.0]]), routing, config).flatten().tolist()
    [45.0, 4.0, 0.0]
    """
    untraced("experts")
    check_config("experts", config)
    routing = as_routing(routing)
    right = usual(params, x, routing, config)
    if not right:
        check_level("experts", params, ("gate_and_up_projs", "down_projs"))
        check_tokens(x, routing, config)
    right = right and dispatcher is local  # another one's ranks have fewer experts each
    multiply = find(backend, x.device)
    autocast = autocast_on(x.device)
    h = x if autocast in (None, x.dtype) or x.dtype == torch.float64 else x.to(autocast)
    inside, power = weighs_inside(config), None
    if inside and h.dtype == torch.float16 and not config.apply_router_weight_after_down:
        power = _power(routing, config)
        routing = routing._replace(weights=routing.weights / power)
    rounded = lambda y: y if y.dtype == x.dtype else y.to(x.dtype)
    whole = lambda y: rounded(y if power is None else y * power)
    with NOTHING if autocast is None else without_autocast(x.device):
        if right and inside and multiply in HERE and not batch_invariant and x.is_cpu:
            given = h, *routing[:2], *params.values()
            short = at_most_recorded(*given) and not (recompute and recorded(*given))
            dtype = x.dtype if power is None else torch.promote_types(routing.weights.dtype, torch.float32)
            if short and (y := direct(params, h, routing, config, dtype)) is not None:
                return whole(y)
        coded = {} if right else in_codes(params)
        alone = inside and dispatcher is local and not coded and not PAIRS.keys() & params.keys()
        # what is computed in fp64 is computed by plain torch, whose products take it
        if alone and isinstance(multiply, Fused) and torch.float64 not in (h.dtype, routing.weights.dtype):
            if not right:
                check_experts(params, config, x.device, n_experts=config.n_routed_experts)
            how = dict(recompute=recompute, wide=h.dtype != x.dtype, batch_invariant=batch_invariant)
            return whole(multiply.layer(params, h, routing, config, **how))
        if coded and not takes_codes(multiply, params):
            multiply = by_expert(multiply, backend if isinstance(backend, str) else _name(backend))
        product = one_by_one(multiply) if batch_invariant else multiply

        def layer(params: Params, h: Tensor, weights: Tensor, plan: Any) -> Tensor:
            with without_autocast(x.device):  # computed again, it may stand in another autocast
                rows = dispatcher.dispatch(h, weights, plan)
                if not right:
                    check_experts(params, config, x.device, n_experts=rows.counts.shape[0], coded=coded)
                run = product if inside else weighed_outside(product)
                made = run(_scaled(params, lora_alpha, h.dtype), rows, config)
                return dispatcher.combine(made if multiply in OURS else check_made(made, rows.x), plan)

        # h has the products' dtype, and so its plan: dispatchers over a group make sure that all ranks send that one
        told = config if dispatcher is local or config.dtype == h.dtype else replace(config, dtype=h.dtype)
        args = dict(params), h, routing.weights, dispatcher.plan(routing, told)
        return whole(again(layer, *args) if recompute else layer(*args))


def _power(routing: Routing, config: MoEConfig) -> Tensor:
    """[T, 1] fp32: the least power of two, from 1 on, that no weight of a token's experts exceeds.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=2, dim=1, moe_inter_dim=1)
    >>> weights = torch.tensor([[0.5, 1.0], [2.5, 9.0], [3.0, 1.0]])
    >>> _power(Routing(torch.tensor([[0, 1], [0, -1], [1, 0]]), weights), config).flatten().tolist()
    [1.0, 4.0, 4.0]
    """
    indices, weights = routing.indices, routing.weights.detach().float().abs()
    mine = (indices >= 0) & (indices < config.n_routed_experts) & (weights > 1) & weights.isfinite()
    most = torch.cat([torch.ones_like(weights[:, :1].sum(-1, keepdim=True)), torch.where(mine, weights, 1.0)], -1)
    return most.amax(-1, keepdim=True).log2().ceil().exp2()


def autocast_on(where: torch.device) -> torch.dtype | None:
    """Autocast's dtype, where it is on; on `meta` there is none."""
    kind = where.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(where: torch.device) -> AbstractContextManager[Any]:
    """A region without autocast."""
    return NOTHING if autocast_on(where) is None else torch.autocast(where.type, enabled=False)


def _scaled(params: Params, alpha: float, dtype: torch.dtype) -> Params:
    """params with lora_alpha / r in the B matrices: backends multiply them as they are, in products of a dtype."""
    least = torch.promote_types(dtype, torch.float32)
    wide = lambda p: p.to(torch.promote_types(p.dtype, least))
    r = {name: p.shape[-1] for name, p in params.items() if name in PAIRS and name.endswith("_A")}
    return {name: wide(p) * (alpha / r[PAIRS[name]]) if PAIRS.get(name) in r else p for name, p in params.items()}


def _name(backend: Any) -> str:
    return str(getattr(backend, "__name__", type(backend).__name__))
