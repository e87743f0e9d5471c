"""What a Transformers module does between the two products of an expert, in fmoe's words.

A module's own words decide: the function `_apply_gate` of its class, or its `act_fn`. What is known by name is also
tried on numbers; what is not known is refused, since kernels that fuse an activation cannot call another one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fmoe.activations import activation, halves
from fmoe.folding import meant
from fmoe.types import EXPERT_ACTIVATIONS, MoEConfig

DEFAULT = "transformers.integrations.moe._default_apply_gate"
PREFIX = "transformers.models."


@dataclass(frozen=True)
class Gate:
    """An activation of `fmoe.activations` with its limits; own: the module's function itself, between the products.

    >>> str(Gate("swiglu", swiglu_limit=7.0)), str(Gate("relu2", own=True))
    ('swiglu(swiglu_limit=7.0)', 'its own function, not gated, between the products')
    """

    name: str
    own: bool = False
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    swiglu_limit: float = 0.0

    def fields(self) -> dict[str, Any]:
        """MoEConfig's fields."""
        limits = ("activation_alpha", "activation_limit", "swiglu_limit")
        return {"expert_activation": self.name} | {name: getattr(self, name) for name in limits}

    def __str__(self) -> str:
        if self.own:
            return f"its own function, {'not gated, ' if self.name == 'relu2' else ''}between the products"
        oai = ("activation_alpha", "activation_limit") if self.name in ("swigluoai", "quick_geglu", "situ") else ()
        used = ("swiglu_limit",) if self.name == "swiglu" and self.swiglu_limit else oai
        told = ", ".join(f"{name}={getattr(self, name)}" for name in used)
        return f"{self.name}({told})" if told else self.name


Read = Callable[[Any], Gate]


def _clamped(name: str) -> Read:
    """swiglu of a gate clipped from above and an up clipped on both sides, at the module's attribute `name`."""
    return lambda m: Gate("swiglu", swiglu_limit=limit) if (limit := float(getattr(m, name))) > 0 else OWN


def _oai(activation: str, alpha: str, limit: str) -> Read:
    def read(m: Any) -> Gate:
        a, l = float(getattr(m, alpha)), float(getattr(m, limit))
        return Gate(activation, activation_alpha=a, activation_limit=l) if l > 0 else OWN

    return read


OWN, SWIGLU, GEGLU = Gate("swiglu", own=True), Gate("swiglu"), Gate("geglu")
KNOWN: dict[str, Read] = {
    DEFAULT: lambda m: gate_of_act(m.act_fn, type(m)),
    PREFIX + "beam.modeling_beam.BeamExperts._apply_gate": lambda m: gate_of_act(m.act_fn, type(m)),
    PREFIX + "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts._apply_gate": _clamped("limit"),
    PREFIX + "glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _clamped("swiglu_limit"),
    PREFIX + "gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": _oai("quick_geglu", "alpha", "limit"),
    PREFIX + "hy_v4.modeling_hy_v4.HYV4Experts._apply_gate": _clamped("swiglu_limit"),
    PREFIX + "hy_v4_vl.modeling_hy_v4_vl.HYV4VLExperts._apply_gate": _clamped("swiglu_limit"),
    PREFIX + "inkling2.modeling_inkling2.Inkling2Experts._apply_gate": lambda m: OWN,
    PREFIX + "inkling2_loop.modeling_inkling2_loop.Inkling2LoopExperts._apply_gate": lambda m: OWN,
    PREFIX + "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": _oai(
        "swigluoai", "swiglu_alpha", "swiglu_limit"
    ),
    PREFIX + "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts._apply_gate": _oai(
        "swigluoai", "alpha", "limit"
    ),
    PREFIX + "step3p7.modeling_step3p7.Step3p7Experts._apply_gate": lambda m: (
        OWN if float(m.limit) < float("inf") else gate_of_act(m.act_fn, type(m))
    ),
}
"""The address of an `_apply_gate` -> what it computes, read off its module. `know` adds to it."""

SILU = {"SiLU", "SiLUActivation", "silu"}
GELU_TANH = {"GELUTanh", "NewGELUActivation"}
ELSEWHERE = ("torch.nn.", "torch._C._nn", "transformers.activations")  # homes of elementwise functions


def know(apply_gate: Callable[..., Tensor], activation: str | None = None, **limits: float) -> None:
    """From now on this `_apply_gate` is an activation of fmoe's, or (None) is called between the two products.

    limits: MoEConfig's fields, as swiglu_limit. The claim is tried on numbers when a module with it is bound.
    """
    if activation is not None and activation not in EXPERT_ACTIVATIONS:
        told = f"{', '.join(EXPERT_ACTIVATIONS)} or None{meant(activation, EXPERT_ACTIVATIONS)}"
        raise ValueError(f"know: activation is {activation!r}, expected one of {told}")
    gate = OWN if activation is None else replace(Gate(activation), **limits)  # type: ignore[arg-type]
    KNOWN[address(apply_gate)] = lambda module: gate


def address(function: Any) -> str:
    """module.qualname of a function or of an object's class.

    >>> address(nn.SiLU()), address(torch.nn.functional.silu)
    ('torch.nn.modules.activation.SiLU', 'torch.nn.functional.silu')
    """
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return str(_address(named))


@lru_cache(maxsize=256)
def _address(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def gate_of_act(act: Any, owner: type, gated: bool = True) -> Gate:
    """Of act(g) * v with an `act_fn` (gated), or of act(u). Raises ValueError for a function of unknown home."""
    where = address(act)
    name = where.rpartition(".")[2]
    if not where.startswith(ELSEWHERE):
        raise ValueError(f"{owner.__name__}.act_fn is {where}: what it computes is not known; {HELP}")
    if gated:
        return SWIGLU if name in SILU else GEGLU if name in GELU_TANH else OWN
    return Gate("relu2", own=name != "ReLUSquaredActivation")


HELP = "fmoe.integrations.gates.know(function, 'swiglu' or the like, or None to have it called) tells, or use eager"


def gate_of(module: nn.Module, tried: Gate | None = None) -> Gate:
    """The gate of a module that `use_experts_implementation` has decorated, or that has an `_apply_gate` or `act_fn`.

    tried: a gate whose numbers need not be tried again. Raises ValueError, with the class and the function, for one
    that is not known, or that is known and gives other numbers, and where the layout that the class declares is not
    the one that it computes with.
    """
    m: Any = module
    if not getattr(m, "has_gate", True):
        gate = gate_of_act(m.act_fn, type(m), gated=False)
        return gate if gate.own or gate == tried else _tried(gate, m.act_fn, type(m))
    function = getattr(type(m), "_apply_gate", None)
    where = DEFAULT if function is None else address(function)
    if where not in KNOWN:
        raise ValueError(f"{type(m).__name__}._apply_gate is {where}: what it computes is not known; {HELP}")
    gate = KNOWN[where](m)
    if gate.own:
        return gate
    interleaved = gate.name == "quick_geglu"
    if interleaved == getattr(m, "is_concatenated", not interleaved):
        declared = "concatenated" if interleaved else "interleaved"
        told = f"but {where} reads it {'interleaved' if interleaved else 'concatenated'}"
        raise ValueError(f"{type(m).__name__} declares gate and up {declared}, {told}: expected one layout; use eager")
    return gate if gate is tried or gate == tried else _tried(gate, applied(m), type(m))


def applied(module: Any) -> Callable[[Tensor], Tensor]:
    """u -> act(u) as the module computes it."""
    if not getattr(module, "has_gate", True):
        return module.act_fn
    return module._apply_gate if hasattr(module, "_apply_gate") else lambda u: glu(module.act_fn, u)


def glu(act: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """act(g) * v with u = [g, v]."""
    g, v = halves(u)
    return act(g) * v


def _tried(gate: Gate, function: Callable[[Tensor], Tensor], owner: type) -> Gate:
    """The gate, if the function gives its numbers: on either side of its limits, as little as they may be."""
    limit = max(n for n in (gate.swiglu_limit, gate.activation_limit, 2.0) if n < float("inf"))
    u = torch.linspace(-1, 1, 240, dtype=torch.float32, device="cpu")
    u = u[torch.arange(240, device="cpu") * 77 % 240].view(30, 8) * 3 * limit
    config = MoEConfig(n_routed_experts=1, n_activated_experts=1, dim=1, moe_inter_dim=1, **gate.fields())
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected, found = activation(config)(u, None), function(u)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
        told = f"shape {list(found.shape)}" if found.shape != expected.shape else "other numbers"
        raise ValueError(f"{owner.__name__}: known as {gate}, its function gives {told}; use eager, and report this")
    return gate
