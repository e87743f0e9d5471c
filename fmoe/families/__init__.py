"""Families as data: Hugging Face's `model_type` -> its `Family`. A new one is a file of rules and a line here."""

from importlib import import_module

from fmoe.families.family import VERIFIED, Family
from fmoe.types import AdapterError

_FILES = """deepseek_kin deepseek_v2 deepseek_v3 deepseek_v4 dots3_note encoder_decoder ernie4_5_vl_moe feed_forward
    fused gemma4 gpt_oss hunyuan inkling longcat_flash minimax mixtral nemotron_h olmoe per_expert
    qwen2_moe qwen3_5_moe qwen3_moe renamed stacked step3p5"""

__all__ = ["FAMILIES", "NO_FAMILY", "VERIFIED", "Family", "family", "register"]

FAMILIES: dict[str, Family] = {}
NO_FAMILY = {
    "doge": "an expert is one row of two embeddings: there are no matrices to stack",
    "vitpose_backbone": "experts are one Linear each, chosen by data set and not by a router",
}
"""Model types with experts in name alone, and why they are none of ours."""


def register(family: Family) -> Family:
    """Add a family of your own under each of its model types: `fmoe.adapter` finds it there, by name or by config.json.

    Raises AdapterError, and adds nothing, where a model type has a family already.
    """
    if taken := [name for name in family.model_types if FAMILIES.get(name, family) != family]:
        raise AdapterError(f"model_type {taken[0]!r} has a family already, from {FAMILIES[taken[0]].source!r}")
    FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises AdapterError, with the known ones, where there is none."""
    if model_type in NO_FAMILY and model_type not in FAMILIES:
        raise AdapterError(f"model_type {model_type!r} is no Mixture-of-Experts family: {NO_FAMILY[model_type]}")
    if model_type not in FAMILIES:
        raise AdapterError(f"model_type {model_type!r} is unknown: expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


for _file in _FILES.split():
    for _value in vars(import_module(f"fmoe.families.{_file}")).values():
        if isinstance(_value, Family):
            register(_value)
