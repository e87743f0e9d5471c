"""LoRA on expert parameters (PEFT's `target_parameters`) as the LoRA of `fmoe.experts`: W + BA is never made.

PEFT wraps the experts module once for each parameter, and for the time of a forward replaces W by W + BA. `install`
changes that one step for modules that run through fmoe: the factors are left on the module, and nothing is added.
Adapters, ranks, scaling, saving, merging and disabling remain PEFT's. Everything else that PEFT wraps, it wraps.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fmoe.integrations.bindings import LORA, is_transposed

HOME = "peft.tuners.lora.layer"


def install(runs_through_fmoe: Callable[[nn.Module], bool]) -> None:
    """PEFT leaves A and B to modules that run through fmoe: from now on, or from when it is imported. Once is enough.

    Raises RuntimeError, then, for a PEFT that wraps parameters in another way.
    """
    if HOME in sys.modules:
        teach(sys.modules[HOME], runs_through_fmoe)
    elif not any(isinstance(finder, _Later) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Later(runs_through_fmoe))


class _Later(MetaPathFinder):
    """Finds one module as it is found anyhow, and teaches it once it is there: PEFT is slow to import, so we do not."""

    def __init__(self, runs_through_fmoe: Callable[[nn.Module], bool]) -> None:
        self.runs_through_fmoe = runs_through_fmoe

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == HOME else None
        if spec is None or spec.loader is None:
            return None
        made = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            made(module)
            teach(module, self.runs_through_fmoe)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def teach(layer: Any, runs_through_fmoe: Callable[[nn.Module], bool]) -> None:
    """`ParamWrapper` of PEFT's module `layer` leaves A and B to modules that run through fmoe."""
    wrapper: Any = getattr(layer, "ParamWrapper", None)
    if not hasattr(wrapper, "_activate_lora"):
        told = f"{layer.__name__} has no ParamWrapper._activate_lora"
        raise RuntimeError(f"{told}: LoRA on experts would not be told; `pip install 'peft>=0.20'`, or uninstall it")
    original = wrapper._activate_lora
    if hasattr(original, "_fmoe"):
        return

    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        base, name = self.get_base_layer(), self.parameter_name
        active = [adapter for adapter in active_adapters or () if adapter in self.lora_A]
        if not active or name not in LORA or self.num_experts == 1 or not runs_through_fmoe(base):
            with original(self, active_adapters):
                yield
            return
        left = base.__dict__.setdefault("_fmoe_lora", {})
        left[name] = factors(self, active, is_transposed(base))
        try:
            yield
        finally:
            del left[name]

    _activate_lora._fmoe = original  # type: ignore[attr-defined]
    wrapper._activate_lora = _activate_lora


def factors(wrapper: Any, adapters: list[str], transposed: bool) -> tuple[Tensor, Tensor]:
    """(A [E, in, r], B [E, r, out]) with A @ B what PEFT adds to a parameter: adapters side by side along r.

    PEFT packs `lora_A` as [(e r), a] and `lora_B` as [b, (r e)]. a is the parameter's last axis if the wrapper has
    swapped features, and otherwise the one before: which of the two goes in, the module knows.
    """
    E = wrapper.num_experts
    a = torch.cat([wrapper.lora_A[n].weight.unflatten(0, (E, -1)) for n in adapters], 1)  # [E, r, a]
    b = torch.cat([wrapper.lora_B[n].weight.unflatten(1, (-1, E)) * wrapper.scaling[n] for n in adapters], 1)
    b = b.permute(2, 1, 0)  # [E, r, b]
    swapped = getattr(wrapper, "_did_swap_in_out_features", False)  # no PEFT before 0.19 did
    return (a.mT, b) if swapped != transposed else (b.mT, a)
