"""Transformers' expert modules as calls of `fmoe.experts` on views of their own parameters.

`decorated` is the forward of every class behind `use_experts_implementation`; `UNDECORATED` has one for each class of
experts that Transformers gives no choice for, by its address in `transformers.models`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmoe.backends import Backend
from fmoe.integrations.composed import layer
from fmoe.integrations.gates import OWN, Gate, address, applied, gate_of, gate_of_act, glu
from fmoe.integrations.kinds import held_by, kind_of, present
from fmoe.integrations.stacks import stacked
from fmoe.shapes import check_held, in_shape
from fmoe.sharding import is_dtensor
from fmoe.types import Routing

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
NATIVE = {"gate_up_proj": "gate_and_up_projs", "up_proj": "gate_and_up_projs", "down_proj": "down_projs"}
LORA = {"gate_up_proj": "lora_gate_and_up", "up_proj": "lora_gate_and_up", "down_proj": "lora_down"}


def is_decorated(module: nn.Module) -> bool:
    """Does Transformers choose this module's forward by `config._experts_implementation`?"""
    return all(name in module.__dict__ for name in (*FLAGS, "config"))


def decorated(
    m: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str | Backend | None = None
) -> Tensor:
    """The forward that Transformers calls: [T, D], [T, K], [T, K] -> [T, D].

    An index of `num_experts`, as expert parallelism marks what another rank has, contributes nothing.
    """
    after = m.post_expert_norm if m.has_post_expert_norm else None
    routing = Routing(top_k_index, top_k_weights)
    return fused(m, hidden_states, routing, backend=backend, after=after)


def fused(
    m: Any, x: Tensor, routing: Routing, *, backend: str | Backend | None, n_experts: int | None = None, **how: Any
) -> Tensor:
    """The experts of a module with stacked parameters: `gate_up_proj` or `up_proj`, `down_proj`, and their biases."""
    gate = gate_of_once(m)
    if gate.own or how.get("after"):
        present(m, x)
    params = views(m, n_experts) | lora(m, n_experts)
    how = {"apply": applied(m)} | how if gate.own or how.get("after") else how
    return in_shape(layer(params, x.reshape(-1, x.shape[-1]), routing, gate, backend=backend, **how), x.shape)


def gate_of_once(m: nn.Module) -> Gate:
    """`gate_of(m)`, kept on the module: what a compiler traces is the second call."""
    kept = m.__dict__.get("_fmoe_gate")
    if kept is None or not torch.compiler.is_compiling():
        kept = m.__dict__["_fmoe_gate"] = gate_of(m, tried=kept)
    return kept


def views(m: Any, n_experts: int | None = None) -> dict[str, Tensor]:
    """A module's parameters under native names: views, [E, D, U] and [E, I, D] whichever way they are stored.

    Raises ValueError for parameters in 8 bits, which have to be decoded first, and for DTensors, of which Transformers
    hands this rank's part to its experts.
    """
    up = "gate_up_proj" if getattr(m, "has_gate", True) else "up_proj"
    biased, transposed = getattr(m, "has_bias", False), is_transposed(m)
    found: dict[str, Tensor] = {}
    for name in (up, "down_proj"):
        if (w := getattr(m, name)) is None:
            raise ValueError(f"{type(m).__name__}.{name} is None, expected a parameter of experts")
        if w.dtype.itemsize < 2 or not w.is_floating_point():
            raise ValueError(f"{type(m).__name__}.{name} is {w.dtype}, expected it decoded: load with dequantize=True")
        if is_dtensor(w):
            raise ValueError(f"{type(m).__name__}.{name} is a DTensor, expected this rank's part: w.to_local()")
        w = w if n_experts is None else w[:n_experts]
        found[NATIVE[name]] = w if transposed else w.mT
        if biased:
            bias = "gate_up_proj_bias" if name == up else "down_proj_bias"
            found[bias] = getattr(m, f"{name}_bias")
    return found


def is_transposed(m: nn.Module) -> bool:
    """Are the stacked parameters [E, in, out]?"""
    declared = getattr(m, "is_transposed", None)
    return kind_of(m).__name__ == "Llama4TextExperts" if declared is None else declared


def lora(m: nn.Module, n_experts: int | None = None) -> dict[str, Tensor]:
    """The LoRA matrices that `fmoe.integrations.peft` has left on a module for this call, of one rank."""
    left: dict[str, tuple[Tensor, Tensor]] = m.__dict__.get("_fmoe_lora", {})
    out: dict[str, Tensor] = {}
    if not left:
        return out
    r = max([a.shape[-1] for a, _ in left.values()])
    for name, (a, b) in left.items():
        short = r - a.shape[-1]
        out[f"{LORA[name]}_A"] = F.pad(a, (0, short))[:n_experts] if short else a[:n_experts]
        out[f"{LORA[name]}_B"] = F.pad(b, (0, 0, 0, short))[:n_experts] if short else b[:n_experts]
    return out


def llama4_moe(m: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama4TextMoe: scores multiply what goes in, and only the K experts that a token chose are computed."""
    present(m, x := hidden_states.reshape(-1, m.hidden_dim))
    scores, logits = m.router(x)
    index = logits.topk(m.top_k, dim=1).indices
    rows = x[:, None] * scores.gather(1, index)[..., None]
    routed = m.experts(rows.flatten(0, 1), index.view(-1, 1), x.new_ones(index.numel(), 1))
    return m.shared_expert(x) + routed.view(*index.shape, -1).sum(1), logits


def llama4_experts(m: Any, x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Llama4TextExperts: as the bound block calls it, or [E T, D], an equal share for each expert in turn."""
    if index is None or weights is None:
        index = torch.arange(m.num_experts, device=x.device).repeat_interleave(len(x) // m.num_experts)[:, None]
        weights = x.new_ones(len(x), 1)
    return fused(m, x, Routing(index, weights), backend=m._fmoe_backend)


def longcat(m: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """LongcatFlashExperts: E experts, and beyond them ids that give a token back, weighted."""
    idle = (weights * (index >= m.num_routed_experts)).sum(1, keepdim=True)
    y = fused(m, x, Routing(index, weights), backend=m._fmoe_backend, n_experts=m.num_routed_experts)
    return y + (idle * x).to(x.dtype)


def step3p7(m: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Step3p7Experts, whose clamps come after silu."""
    return fused(m, x, Routing(index, weights), backend=m._fmoe_backend)


def jetmoe(m: Any, layer_input: Tensor) -> Tensor:
    """JetMoeMoE: its router's logits, one softmax over the K that were chosen, a bias on the sum."""
    plain(m, ("input_linear", "output_linear"), "JetMoeParallelExperts")
    present(m, x := layer_input.reshape(-1, m.input_size))
    top = m.router(x)[-1].topk(m.router.top_k, dim=1)
    weights = torch.softmax(top.values, dim=1).type_as(x)
    params = {"gate_and_up_projs": m.input_linear.weight.mT, "down_projs": m.output_linear.weight.mT}
    gate, apply = gate_of_act(m.activation, type(m)), lambda u: glu(m.activation, u)
    y = layer(params, x, Routing(top.indices, weights), gate, backend=m._fmoe_backend, apply=apply)
    return y.view(layer_input.shape) + m.bias


def dbrx(m: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DbrxExperts: gate and up are parameters of their own, so u is two products side by side."""
    plain(m, ("mlp",), "DbrxExpertGLU")
    present(m, hidden_states)
    x, act = hidden_states.reshape(-1, m.hidden_size), m.mlp.activation_fn
    each = lambda w: w.view(m.num_experts, m.ffn_hidden_size, m.hidden_size)
    params = {"gate_projs": each(m.mlp.w1).mT, "up_projs": each(m.mlp.v1).mT, "down_projs": each(m.mlp.w2)}
    apply, ups = lambda u: glu(act, u), ("gate_projs", "up_projs")
    routing = Routing(top_k_index, top_k_weights)
    y = layer(params, x, routing, OWN, backend=m._fmoe_backend, apply=apply, ups=ups)
    return in_shape(y, hidden_states.shape)


def switch(m: Any, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """SwitchTransformersExperts: mask [T, 1, E] has a one where a token goes, and none where it was dropped."""
    index = torch.where(mask.bool().any(-1), mask.argmax(-1), -1)
    return _listed(m, x, index, weights, "SwitchTransformersDenseActDense", ("wi", "wo"))


def nllb(m: Any, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """NllbMoeExperts: the entries of mask [T, E] are what Transformers reads as expert ids, weighted by weights[t]."""
    y = _listed(m, x, mask, weights, "NllbMoeDenseActDense", ("fc1", "fc2"))
    return y if m.training or not m.moe_token_dropout else y * (1 - m.moe_token_dropout)


def _listed(m: Any, x: Tensor, index: Tensor, weights: Tensor, kind: str, names: tuple[str, str]) -> Tensor:
    """Experts that are modules of their own, [U, D] and [D, I] each, with or without biases."""
    each = [m[f"expert_{e}"] for e in range(m.num_experts)]
    plain(m, tuple(f"expert_{e}" for e in range(m.num_experts)), kind)
    for expert in each:
        plain(expert, names, nn.Linear)

    def column(name: str, what: str) -> Tensor:
        parts = [getattr(getattr(expert, name), what) for expert in each]
        check_held(type(m).__name__, {f"expert_{e}.{name}.{what}": p for e, p in enumerate(parts)}, x.device)
        return stacked(parts)

    params = {"gate_and_up_projs": column(names[0], "weight").mT, "down_projs": column(names[1], "weight").mT}
    if getattr(each[0], names[0]).bias is not None:
        params |= {"gate_up_proj_bias": column(names[0], "bias"), "down_proj_bias": column(names[1], "bias")}
    dropout = getattr(m, "token_dropout", None) if m.training and getattr(m, "moe_token_dropout", 0) else None
    apply = lambda u: each[0].dropout(each[0].act(u))
    how = dict(backend=m._fmoe_backend, apply=apply, after=dropout)
    return layer(params, x, Routing(index, weights), Gate("relu2", own=True), **how)


def plain(m: Any, names: tuple[str, ...], kind: type | str) -> None:
    """Are the children that hold parameters what they were, and not wrapped? What wraps them would not be heard."""
    for name in names:
        child = getattr(m, name)
        if (held_by(child).__name__ if isinstance(kind, str) else held_by(child)) != kind:
            expected = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
            found = f"{address(child)}, expected {expected}"
        elif "forward" in child.__dict__ or child._forward_hooks or child._forward_pre_hooks:
            found = f"{address(child)} with hooks, as accelerate's, expected none"
        else:
            continue
        raise ValueError(
            f"{type(m).__name__} runs in fmoe on parameters of {name!r}, a {found}: its forward would not be called;"
            " `undo()` the patch, or unwrap it"
        )


UNDECORATED = {
    "llama4.modeling_llama4.Llama4TextMoe": llama4_moe,
    "llama4.modeling_llama4.Llama4TextExperts": llama4_experts,
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": longcat,
    "step3p7.modeling_step3p7.Step3p7Experts": step3p7,
    "jetmoe.modeling_jetmoe.JetMoeMoE": jetmoe,
    "dbrx.modeling_dbrx.DbrxExperts": dbrx,
    "switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": switch,
    "nllb_moe.modeling_nllb_moe.NllbMoeExperts": nllb,
}
OTHERS = {
    "JetMoeMoA": "a mixture of attention: between its two products lies attention",
    "DogeCDMoE": "its experts are rows of embeddings, not matrices",
    "FP8Experts": "weights in 8 bits; load with dequantize=True",
}
"""Classes that hold experts and cannot be bound, and why."""


def binding_of(module: nn.Module) -> Any:
    """The entry of `UNDECORATED` for a module, or None."""
    kind = kind_of(module)
    where = f"{kind.__module__}.{kind.__qualname__}"
    return UNDECORATED.get(where.removeprefix("transformers.models."))


def unknown(name: str, module: nn.Module) -> bool:
    """Does a module that is neither decorated nor in any table here hold experts all the same, to go by its name?"""
    kind = kind_of(module).__name__
    named = name.rpartition(".")[2] == "experts" or kind.endswith("Experts")
    shared = "shared" in name.lower() or "Shared" in kind
    inside = (is_decorated(m) or binding_of(m) is not None for m in module.modules())
    return named and not shared and not any(inside)
