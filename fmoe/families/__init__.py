"""Families as data: Hugging Face's `model_type` -> its `Family`. A new one is a file of rules and a line here."""

from fmoe.families.deepseek_v3 import deepseek_v3
from fmoe.families.family import Family
from fmoe.families.gpt_oss import gpt_oss
from fmoe.families.mixtral import mixtral
from fmoe.families.nemotron_h import nemotron_h
from fmoe.families.per_expert import per_expert, per_expert_non_gated
from fmoe.families.qwen3_5_moe import qwen3_5_moe
from fmoe.families.qwen3_moe import qwen3_moe
from fmoe.families.step3p5 import step3p5
from fmoe.types import AdapterError

_ALL = (deepseek_v3, gpt_oss, mixtral, nemotron_h, per_expert, per_expert_non_gated, qwen3_5_moe, qwen3_moe, step3p5)

FAMILIES: dict[str, Family] = {name: family for family in _ALL for name in family.model_types}


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises AdapterError, with the known ones, where there is none."""
    if model_type not in FAMILIES:
        raise AdapterError(f"model_type {model_type!r} is unknown: expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
