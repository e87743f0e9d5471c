"""A Hugging Face config whose sizes change under every name that it has for them."""

from collections.abc import Mapping
from typing import Any

import torch

from fmoe.families import family
from fmoe.families.kind import Family, as_dict
from fmoe.families.sparse import layer_count
from fmoe.routing import SCORES
from fmoe.types import MoEConfig


def as_given(config: Any) -> dict[str, Any]:
    """A copy of the config as a dict. Raises ValueError for what is none."""
    if isinstance(config, type) or not (isinstance(config, Mapping) or hasattr(config, "to_dict")):
        raise ValueError(
            f"surgery: config is of type {type(config).__name__}, expected a dict or a Transformers config"
        )
    return dict(config if isinstance(config, Mapping) else config.to_dict())


def known(config: Any) -> tuple[dict[str, Any], Family, MoEConfig]:
    """(the config as a dict, its family, its MoEConfig). Raises ValueError where its router is none of ours."""
    given = as_given(config)
    kind, moe = _known(given)
    return given, kind, moe


@torch.compiler.assume_constant_result  # what a config says is no part of a graph
def _known(given: dict[str, Any]) -> tuple[Family, MoEConfig]:
    if not isinstance(model_type := given.get("model_type"), str):
        raise ValueError(f"surgery: config.model_type is {model_type!r}, expected the name of a family")
    kind = family(model_type)
    moe = kind.adapter(given).moe_config
    if moe.score_func not in SCORES:
        raise ValueError(
            f"surgery: {model_type}: its router ({moe.score_func}) is none of ours: experts cannot be told"
        )
    return kind, moe


def resized(config: Mapping[str, Any], names: str, value: int, layer: int | None = None) -> dict[str, Any]:
    """The config with `value` under each of some names that it has, at any depth; under the first where it has none.

    layer: where the config has a list, one number for each layer: the entry that changes.

    >>> resized({"num_experts": 8, "text_config": {"num_local_experts": 8}}, "num_local_experts num_experts", 4)
    {'num_experts': 4, 'text_config': {'num_local_experts': 4}}
    """
    made, found = _resized(config, names.split(), value, layer)
    if not found:
        inner = next((n for n in ("text_config", "ffn_config") if isinstance(made.get(n), Mapping)), None)
        first = {names.split()[0]: value}
        made |= {inner: {**made[inner], **first}} if inner else first
    return made


def _resized(config: Mapping[str, Any], names: list[str], value: int, layer: int | None) -> tuple[dict[str, Any], bool]:
    made, found = dict(config), False
    for name, old in config.items():
        if name in names and old is not None:
            made[name], found = _entry(old, value, layer), True
        elif isinstance(old, Mapping) and name in ("text_config", "ffn_config"):
            made[name], inside = _resized(old, names, value, layer)
            found = found or inside
    return made, found


def _entry(old: Any, value: int, layer: int | None) -> Any:
    if not isinstance(old, list):
        return value
    return [value if layer in (None, i) else n for i, n in enumerate(old)]


def says_each_layer(config: Any, names: str) -> bool:
    """Has the config a number for each layer? (ERNIE-VL has one for text and one for images.)"""
    given = as_dict(config)
    lists = [value for name in names.split() if isinstance(value := given.get(name), list)]
    return any(len(value) == (layer_count(given) or len(value)) for value in lists)
