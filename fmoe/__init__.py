"""Mixture-of-Experts checkpoints and expert layers as values and pure functions: the public names, nothing else."""

from importlib import import_module
from typing import Any

from fmoe import families, lora, sharding
from fmoe.activations import is_gated_activation
from fmoe.checkpoint import adapter, convert, inspect, load, save, verify
from fmoe.layer.block import moe
from fmoe.layer.experts import experts
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import alias, drop, either, keep, rename, rule, together
from fmoe.types import AdapterError, MoEConfig, Params, Routing, TensorSpec, subtree

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("dcp", "integrations", "nn", "parallel", "testing"):  # on first use: testing needs hypothesis, ..
        return import_module(f"fmoe.{name}")
    if name == "patch":
        return import_module("fmoe.integrations.patch").patch
    raise AttributeError(f"module 'fmoe' has no attribute {name!r}")


__all__ = [
    "Adapter",
    "AdapterError",
    "MoEConfig",
    "Params",
    "Routing",
    "TensorSpec",
    "adapter",
    "alias",
    "convert",
    "drop",
    "either",
    "experts",
    "families",
    "inspect",
    "is_gated_activation",
    "keep",
    "load",
    "lora",
    "moe",
    "rename",
    "rule",
    "save",
    "sharding",
    "subtree",
    "together",
    "verify",
]
