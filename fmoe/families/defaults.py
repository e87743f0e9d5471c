"""What a config means that leaves a field out: what the class of Transformers takes, where that is not MoEConfig's own.

DEFAULTS[model type][a field of MoEConfig]. Tests compare them with the classes. How many shared experts there are, and
how wide, is no field of these: a checkpoint's tensors say it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fmoe.families.known import class_of, known

_V3 = dict(n_expert_groups=8, n_limited_groups=4, route_scale=2.5)
_CLAMPED = dict(swiglu_limit=10.0)
_NORMED = dict(norm_topk_prob=True)

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": _V3,
    "deepseek_v32": _V3,
    "axk1": _V3,
    "axk2": dict(route_scale=2.5),
    "beam": _V3,
    "bailing_hybrid": _V3,
    "glm_moe_dsa": dict(route_scale=2.5),
    "glm4_moe_lite": dict(route_scale=1.8),
    "glm5_next_text": dict(route_scale=2.5) | _CLAMPED,
    "hy_v4": dict(route_scale=2.827) | _CLAMPED,
    "hy_v4_vl_text": dict(route_scale=2.827) | _CLAMPED,
    "hy_v3": dict(route_scale=2.826),
    "sarvam_mla": dict(route_scale=2.5),
    "sarvam_moe": dict(route_scale=2.5),
    "exaone_moe": dict(route_scale=2.5),
    "kimi_linear": dict(route_scale=2.446),
    "minimax_m3_vl_text": dict(route_scale=2.0),
    "longcat_flash": dict(route_scale=6.0, n_zero_experts=256),
    "inkling2_text": dict(route_scale=8.0),
    "inkling2_loop_text": dict(route_scale=8.0),
    "deepseek_v4": dict(route_scale=1.5) | _CLAMPED,
    "nemotron_h": _NORMED,
    "dots1": dict(norm_topk_prob=False),
    "mellum": _NORMED,
    "mistral4": _NORMED,
    "lara_mini": _NORMED,
    "lfm2_moe": _NORMED,
    "qwen3_omni_moe_text": _NORMED,
    "qwen4_exp_text": _NORMED,
    "muse_spark_text": dict(norm_eps=1e-5, logit_scale=0.1767766952966369),
}

LAYERS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "beam", "glm5_next_text"), dict(first_k_dense_replace=3)
    ),
    "flint": dict(mlp_only_layers=[0, 1]),
    "jamba": dict(expert_layer_period=2, expert_layer_offset=1),
}
"""The same of the fields by which a config says which layers have experts: of classes for which it matters."""


def with_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what its class takes of which layers have experts, where that is left out or null.

    >>> with_layers({"model_type": "flint", "mlp_only_layers": None})["mlp_only_layers"]
    [0, 1]
    """
    taken = LAYERS.get(str(config.get("model_type")), {})
    return {**config, **{field: value for field, value in taken.items() if config.get(field) is None}}


def with_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the class of its model type in Transformers, where it names none and that is known.

    >>> with_class({"model_type": "mixtral"})["architectures"]
    ['MixtralForCausalLM']
    """
    entry = known().get(str(config.get("model_type"))) if class_of(config) is None else None
    return {**config, **({"architectures": [entry["class"]]} if entry else {})}


def left_out(model_types: Iterable[str], n_experts: Any) -> dict[str, Any]:
    """The defaults of the first of these model types that has any; no groups where a class cannot have that many.

    A group's score is the sum of its two best: the class itself fails where a group would have fewer.

    >>> left_out(["mistral4", "mixtral"], 8), left_out(["deepseek_v3"], 8)
    ({'norm_topk_prob': True}, {'route_scale': 2.5})
    """
    found = dict(next((DEFAULTS[kind] for kind in model_types if kind in DEFAULTS), {}))
    if isinstance(n_experts, int) and "n_expert_groups" in found and n_experts < 2 * found["n_expert_groups"]:
        del found["n_expert_groups"], found["n_limited_groups"]
    return found
