"""Families as data: Hugging Face's `model_type` -> its `Family`. A new one is a file of rules and a word here."""

import warnings
from importlib import import_module
from importlib.metadata import entry_points

from fmoe.entrance import held
from fmoe.families.kind import VERIFIED, Family
from fmoe.folding import meant
from fmoe.layout.adapter import Adapter
from fmoe.types import AdapterError, brief

_FILES = {
    "per_expert": """deepseek_kin deepseek_v2 deepseek_v3 dots3_note encoder_decoder general longcat_flash nemotron_h
        olmoe qwen2_moe qwen3_moe""",
    "renamed": "deepseek_v4 deepseek_v41 ernie4_5_vl_moe hunyuan hunyuan_image minimax mixtral under_mlp",
    "fused": "feed_forward gemma4 gpt_oss in_memory inkling qwen3_5_moe stacked step3p5",
}

__all__ = ["FAMILIES", "NO_FAMILY", "VERIFIED", "Family", "family", "register"]

FAMILIES: dict[str, Family] = {}
NO_FAMILY = {
    "doge": "an expert is one row of two embeddings: there are no matrices to stack",
    "vitpose_backbone": "experts are one Linear each, chosen by data set and not by a router",
}
"""Model types with experts in name alone, and why they are none of ours."""

OWN = "adapter= (--adapter package.module:name) for rules of your own"
_ADDED = "fmoe.families.register(it), or an entry point of the group fmoe.families in your package, adds it"
KNOWN = f"Fix: {OWN}, a Family in fmoe.families for a family ({_ADDED}); known ones: fmoe families"
"""The end of a message about a model type that has no family: what helps, and where the known ones are listed."""


def register(family: Family) -> Family:
    """Add a family of your own under each of its model types: `fmoe.adapter` finds it there, by name or by config.json.

    Raises AdapterError, and adds nothing, where a model type has a family already.

    >>> register(FAMILIES["mixtral"]) is FAMILIES["mixtral"]  # there already, and the same: nothing changes
    True
    """
    if taken := [name for name in family.model_types if FAMILIES.get(name, family) != family]:
        raise AdapterError(f"model_type {taken[0]!r} has a family already, from {FAMILIES[taken[0]].source!r}")
    FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises AdapterError, with the nearest one and what to do, where there is none.

    >>> family("mixtral").layout
    '{pre}layers.{l}.block_sparse_moe.experts.{e}.{g=w1|w3}.weight [i d]'
    """
    if not isinstance(model_type, str):
        raise AdapterError(f"model_type {brief(model_type)} is no name. {KNOWN}")
    if model_type in NO_FAMILY and model_type not in FAMILIES:
        raise AdapterError(f"model_type {model_type!r} is no Mixture-of-Experts family: {NO_FAMILY[model_type]}")
    if model_type not in FAMILIES:
        raise AdapterError(f"model_type {model_type!r} is unknown. {KNOWN}{meant(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def opened(adapter: Adapter) -> Adapter:
    """A family's adapter with its layouts open; one that is of no family as it is.

    >>> chosen = FAMILIES["qwen3_moe"].adapter({"model_type": "qwen3_moe"}, layout="fused")
    >>> "layout" in repr(chosen), "layout=per_expert|fused" in repr(opened(chosen))
    (False, True)
    """
    kind = FAMILIES.get(str((adapter.config or {}).get("model_type")))
    return kind.adapter(adapter.config) if kind else adapter


for _folder, _files in _FILES.items():
    for _file in _files.split():
        for _value in vars(import_module(f"fmoe.families.{_folder}.{_file}")).values():
            if isinstance(_value, Family):
                register(_value)

for _entry in entry_points(group="fmoe.families"):  # of installed packages: each names a Family of theirs
    try:
        register(_entry.load())
    except Exception as _error:  # one package's fault is not everybody's
        warnings.warn(f"fmoe.families: entry point {_entry.name!r} ({_entry.value}): {_error}", stacklevel=1)

held(globals(), "Family family register")
