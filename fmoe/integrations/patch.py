"""`fmoe.patch`: every module of experts in a model, bound to fmoe where it stands."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fmoe.backends import Backend
from fmoe.entrance import held
from fmoe.integrations import bindings, stacks, transformers
from fmoe.integrations.kinds import Registered, kind_of
from fmoe.layout.eager.html import table
from fmoe.sharding import is_dtensor


class Bound(NamedTuple):
    """A module, and what became of it: how it runs, or why it is not bound."""

    name: str
    kind: str
    told: str


@dataclass(frozen=True)
class Report:
    """What `fmoe.patch` bound, and what it passed over; `undo()` puts everything back. Its text lists both."""

    bound: tuple[Bound, ...]
    passed: tuple[Bound, ...]
    restore: list[Callable[[], None]] = field(default_factory=list, repr=False, compare=False)

    def undo(self) -> None:
        """The modules as they were. Once is enough; parameters that were laid side by side stay where they are."""
        while self.restore:
            self.restore.pop()()

    def __str__(self) -> str:
        lines = [f"bound to fmoe: {len(self.bound)}", *(f"  {b.name} ({b.kind}): {b.told}" for b in self.bound)]
        lines += [f"not bound: {len(self.passed)}", *(f"  {b.name} ({b.kind}): {b.told}" for b in self.passed)]
        return "\n".join(lines if self.passed else lines[:-1])

    def _repr_html_(self) -> str:
        rows = [("bound to fmoe", b) for b in self.bound] + [("not bound", b) for b in self.passed]
        return table((state, b.name, b.kind, b.told) for state, b in rows)


def patch(model: nn.Module, backend: str | Backend | None = None) -> Report:
    """Every module of experts in model runs `fmoe.experts` on its own parameters, from now until `undo()`.

    Binds what Transformers decorates, and llama4, longcat_flash, step3p7, jetmoe, dbrx, switch_transformers and
    nllb_moe, in any model that holds them, LoRA-wrapped by PEFT or not. backend: as in `fmoe.experts`. No weight is
    copied; experts that are modules of their own are moved side by side once.

    Raises ValueError where nothing was bound, and, before anything is changed, for a module whose activation is not
    known or whose forward something else has replaced. ImportError without Transformers.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_local_experts=4)
    >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    >>> report = patch(model)
    >>> print(report)
    bound to fmoe: 1
      model.layers.0.mlp.experts (MixtralExperts): swiglu
    >>> report.undo()
    """
    label = f"fmoe:{'auto' if backend is None else backend if isinstance(backend, str) else _spelled(backend)}"
    transformers.register(label, backend)
    steps: list[tuple[Callable[[Any, Any], Callable[[], None]], Any, Any]] = []
    bound, passed = list[Bound](), list[Bound]()
    for name, module in model.named_modules():
        kind = kind_of(module).__name__
        if kind in bindings.OTHERS:
            passed.append(Bound(name, kind, bindings.OTHERS[kind]))
        elif bindings.is_decorated(module):
            steps.append((_configure, module, (label, backend)))
            bound.append(Bound(name, kind, str(bindings.gate_of_once(module)) + _norm(module)))
        elif (forward := bindings.binding_of(module)) is not None:
            _own_forward(name, module)
            steps.append((_replace, module, (forward, backend)))
            bound.append(Bound(name, kind, (forward.__doc__ or "").split(": ", 1)[-1].splitlines()[0].rstrip(".")))
        elif bindings.unknown(name, module) and not any(name.startswith(f"{b.name}.") for b in (*bound, *passed)):
            passed.append(Bound(name, kind, "a class that fmoe does not know"))
    report = Report(tuple(bound), tuple(passed))
    if not bound:
        raise ValueError(f"{type(model).__name__} has no experts that fmoe can bind\n{report}")
    for step, module, what in steps:
        report.restore.append(step(module, what))
    return report


def _norm(module: Any) -> str:
    return ", its own norm after them" if module.has_post_expert_norm else ""


def _spelled(backend: Backend) -> str:
    return f"{getattr(backend, '__name__', type(backend).__name__)}@{id(backend):x}"


def _own_forward(name: str, module: nn.Module) -> None:
    taken = module.__dict__.get("forward")
    if taken is not None and "_fmoe_backend" not in module.__dict__:
        told = f"the forward of {name!r} ({type(module).__name__}) is {getattr(taken, '__qualname__', taken)!r} already"
        raise ValueError(f"{told}, expected its class's own: fmoe.patch before what replaces it")


def _configure(module: Any, what: tuple[str, Any]) -> Callable[[], None]:
    """The module's own copy of its config says which implementation it runs: what wraps its forward still does."""
    config = copy.copy(module.config)
    config._experts_implementation_internal = what[0]
    return _set(module, {"config": config, "_fmoe_registered": Registered(*what)})


def _replace(module: nn.Module, what: tuple[Callable[..., Any], Any]) -> Callable[[], None]:
    # no bound method: a pickle would look for it under its name on the module
    restore = _set(module, {"forward": partial(what[0], module), "_fmoe_backend": what[1]})
    if isinstance(module, nn.ModuleDict):  # experts that are modules of their own
        each = [dict(child.named_parameters()) for name, child in module.items() if name.startswith("expert_")]
        sharded = any(is_dtensor(p) for parameters in each for p in parameters.values())
        if not sharded and all(parameters.keys() == each[0].keys() for parameters in each):
            for name in each[0]:
                stacks.gather([parameters[name] for parameters in each])
    return restore


def _set(module: nn.Module, what: dict[str, Any]) -> Callable[[], None]:
    before = {name: module.__dict__[name] for name in what if name in module.__dict__}
    module.__dict__ |= what

    def restore() -> None:
        for name in what:
            module.__dict__.pop(name, None)
        module.__dict__ |= before

    return restore


held(globals(), "patch", where="fmoe")
