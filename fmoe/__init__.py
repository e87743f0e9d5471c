"""Mixture-of-Experts checkpoints and expert layers as values and pure functions: the public names, nothing else.

Each is imported when it is first used, so that `fmoe --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker and an editor see
    from fmoe import activations as activations
    from fmoe import backends as backends
    from fmoe import checkpoint as checkpoint
    from fmoe import codecs as codecs
    from fmoe import dcp as dcp
    from fmoe import dispatch as dispatch
    from fmoe import docs as docs
    from fmoe import draw as draw
    from fmoe import families as families
    from fmoe import integrations as integrations
    from fmoe import lora as lora
    from fmoe import losses as losses
    from fmoe import nn as nn
    from fmoe import parallel as parallel
    from fmoe import routing as routing
    from fmoe import sharding as sharding
    from fmoe import surgery as surgery
    from fmoe import sync as sync
    from fmoe import systems as systems
    from fmoe import testing as testing
    from fmoe.activations import is_gated_activation
    from fmoe.checkpoint.convert import convert
    from fmoe.checkpoint.inspect import inspect
    from fmoe.checkpoint.load import load
    from fmoe.checkpoint.open import adapter
    from fmoe.checkpoint.report import CheckpointWarning
    from fmoe.checkpoint.save import save
    from fmoe.checkpoint.verify import verify
    from fmoe.integrations.patch import patch
    from fmoe.layer.block import moe
    from fmoe.layer.experts import experts
    from fmoe.layout.adapter import Adapter
    from fmoe.layout.build import alias, drop, either, keep, rename, rule, together
    from fmoe.routing.choose import route
    from fmoe.types import AdapterError, MoEConfig, Params, Routed, Routing, TensorSpec, subtree

__version__ = "0.1.0"

_MODULES = """activations backends checkpoint codecs dcp dispatch docs draw families integrations lora losses nn
    parallel routing sharding surgery sync systems testing""".split()
_NAMES = {
    "types": "AdapterError MoEConfig Params Routed Routing TensorSpec",
    "entrance": "subtree",
    "layout.adapter": "Adapter",
    "layout.build": "alias drop either keep rename rule together",
    "checkpoint.report": "CheckpointWarning",
    "checkpoint": "adapter convert inspect load save verify",
    "activations": "is_gated_activation",
    "layer.block": "moe",
    "layer.experts": "experts",
    "routing": "route",
    "integrations.patch": "patch",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"fmoe.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'fmoe' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"fmoe.{_WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*_MODULES, *_WHERE, "__version__"])


__all__ = [
    "Adapter",
    "AdapterError",
    "CheckpointWarning",
    "MoEConfig",
    "Params",
    "Routed",
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
    "losses",
    "moe",
    "patch",
    "rename",
    "route",
    "routing",
    "rule",
    "save",
    "sharding",
    "subtree",
    "systems",
    "together",
    "verify",
]
