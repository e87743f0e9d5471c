"""What a model saves, as Transformers names it, and what its base saves on its own."""

import copy
import re
from typing import Any

import torch

import fmoe
from fmoe.families.numbered import by_stack, decoder
from fmoe.types import TensorSpec

NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
TOWER = re.compile(r"vision|visual|audio|resampler|projector|merger|sam_model|qwen2_model|view_sep|image_newline")


def unfilled(cls: Any, config: Any) -> Any:
    """A model of this config, without memory."""
    with torch.device("meta"):
        return cls._from_config(copy.deepcopy(config), dtype=torch.float32)


def saved(model: Any, name: str, original: bool) -> tuple[dict[str, Any], dict[str, TensorSpec]]:
    """The config of a model as it is written, and names and shapes of what it saves."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = model.all_tied_weights_keys or {}
    state = {n: t for n, t in model.state_dict().items() if n not in tied}
    specs = revert_weight_conversion(model, state) if original else state
    given = model.config.to_dict()
    experts = given["n_routed_experts"] if name == "longcat_flash" else None  # zero experts have weights here
    late = lambda n: experts and (hit := re.search(r"\.experts\.(\d+)\.", n)) and int(hit[1]) >= experts
    return given, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in specs.items() if not late(n)}


def originals(name: str) -> tuple[bool, ...]:
    """Whether as published, then as in memory; that of LongCat is not read."""
    return (True,) if name == "longcat_flash" else (True, False)


def base_of(model: Any) -> Any:
    """A model's base, as AutoModel builds it; of a class that has none, the model."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def named(model: Any, name: str, original: bool) -> tuple[dict[str, Any], set[str]]:
    """A model's config.json, and the native names of what it saves."""
    given, specs = saved(model, name, original)
    given["architectures"] = [type(model).__name__]
    return given, set(fmoe.adapter(given["model_type"], given).from_hf(specs))


def base_root(model: Any, name: str, original: bool) -> set[str]:
    """Names outside of layers of the text model's base, without its stem."""
    names = named(base_of(model), name, original)[1]
    stem = re.sub(r"[^.]*$", "", decoder(by_stack(names)))
    ours = {n.removeprefix(stem) for n in names if n.startswith(stem)}
    return {n for n in ours if not (NUMBERED.match(n) or TOWER.search(n))}


def towers(config: Any, stem: str, names: set[str]) -> list[str]:
    """What stands beside the text model, with its dots: a text-only checkpoint has none of it."""
    if not hasattr(config, "text_config"):
        return []
    outside = {n for n in names if (not n.startswith(stem) or TOWER.search(n)) and "lm_head" not in n}
    return sorted({".".join(n.split(".")[: 2 if n.startswith("model.") else 1]) + "." for n in outside})
