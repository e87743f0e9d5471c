"""Kernels on tensors and offsets, for Mixture-of-Experts layers; they have never heard of a model.

    experts      a whole expert layer, differentiable
    activations  swiglu and the others, act(u, p)
    tune         measures tiles on this GPU and writes a table
    products     gmm and tgmm on sorted rows, raw
    reference    the eager twin of each: imports torch only, and is the specification

Triton is imported on first use.
"""

from typing import Any

_WHERE = {
    "activations": "programs.activations",
    "experts": "ops.layer",
    "products": "ops.products",
    "reference": "reference",
    "tune": "tools.tuning",
}
__all__ = ["activations", "experts", "products", "reference", "tune"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'fmoe_kernels' has no attribute {name!r}")
    module = import_module(f"fmoe_kernels.{_WHERE[name]}")
    return getattr(module, name) if name in ("experts", "tune") else module
