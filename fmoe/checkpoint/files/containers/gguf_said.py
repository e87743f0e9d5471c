"""What a GGUF file's metadata say of the model, against its config: llama.cpp computes with the former alone."""

from collections.abc import Iterable, Iterator, Mapping
from math import isclose
from typing import Any

from fmoe.checkpoint.files.containers.gguf import File
from fmoe.families import FAMILIES
from fmoe.families.kind import as_dict

METADATA = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps norm_eps",
    "rope.freq_base": "rope_theta",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "n_activated_experts",
    "expert_feed_forward_length": "moe_inter_dim",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "route_scale",
    "expert_weights_norm": "norm_topk_prob",
}
"""Keys of GGUF, after the architecture's name, and a config's or MoEConfig's fields that say the same."""

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
}
"""Model types, and what llama.cpp computes them as."""


def other_model(file: File, config: Mapping[str, Any]) -> list[str]:
    """A note where the file says otherwise than the config what a model computes.

    >>> from pathlib import Path
    >>> from fmoe.checkpoint.files.containers.gguf import Key
    >>> said = {"general.architecture": "qwen3moe", "qwen3moe.rope.freq_base": 5.0, "qwen3moe.context_length": 8}
    >>> file = File(Path("x.gguf"), None, {n: Key(0, 0, 0, v) for n, v in said.items()}, {}, 32)
    >>> other_model(file, {"model_type": "qwen3_moe", "rope_theta": 7})
    ['x.gguf is not as the config: rope.freq_base 5.0, expected 7. Fix: ...']
    """
    odd = "; ".join(_unlike({name: key.value for name, key in file.keys.items()}, config))
    return [f"{file.path} is not as the config: {odd}. Fix: use the config and the file of one model"] if odd else []


def _unlike(keys: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    given, kind = as_dict(config), FAMILIES.get(str(config.get("model_type")))
    rope, moe = given.get("rope_parameters"), {"route_scale": 1.0} | kind.values(given) if kind else {}
    said = {**moe, **given, **(rope if isinstance(rope, dict) else {})}
    ahead = _numbers([given.get("num_nextn_predict_layers")])
    arch, named = keys.get("general.architecture"), ARCHITECTURES.get(str(config.get("model_type")))
    if arch is not None and named not in (None, arch):
        yield f"general.architecture {arch!r}, expected {named!r}"
    for key, names in METADATA.items():
        found, expected = keys.get(f"{arch}.{key}"), _numbers(map(said.get, names.split()))
        if key == "block_count":  # with the layers that look ahead, or without
            expected += [n + more for n in expected for more in ahead]
        if key == "attention.head_count_kv" and given.get("kv_lora_rank"):  # as one head that all share
            continue
        if key == "expert_weights_scale" and found == 0:  # as llama.cpp has it of no scale
            found = 1.0
        alike = [isclose(n, m, rel_tol=1e-6) for n in _numbers([found]) for m in expected]
        if alike and not any(alike):
            yield f"{key} {found}, expected {' or '.join(map(str, dict.fromkeys(expected)))}"


def _numbers(values: Iterable[Any]) -> list[Any]:
    """Those that are numbers a GGUF can hold."""
    return [v for v in values if isinstance(v, int | float) and (isinstance(v, float) or abs(v) < 2**64)]
