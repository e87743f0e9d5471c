"""What a config means that leaves a field out: what the class of Transformers takes, where that is not MoEConfig's own.

DEFAULTS[model type][a field of MoEConfig]. Tests compare them with the classes. How many shared experts there are, and
how wide, is no field of these: a checkpoint's tensors say it.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fmoe.families.known import class_of, known
from fmoe.families.sparse import ANY, EVERY, LISTS, WAYS, sparse_layers

_V3 = dict(n_expert_groups=8, n_limited_groups=4, route_scale=2.5)
_CLAMPED = dict(swiglu_limit=10.0)
_NORMED = dict(norm_topk_prob=True)
_DENSE, _DENSE_3 = dict(first_k_dense_replace=1), dict(first_k_dense_replace=3)

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

_READ: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    (
        "",
        {},
        """aria aria_text dbrx flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
        hunyuan_v1_moe inkling2 inkling2_loop inkling2_loop_text inkling2_text jetmoe kolibri1 lara_mini longcat_flash
        minimax minimax_m2 mixtral olmoe openai_privacy_filter phimoe qwen3_5_moe qwen3_5_moe_text qwen4_exp
        qwen4_exp_text solar_open zaya""",
    ),
    (
        "decoder_sparse_step mlp_only_layers",
        {},
        """qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe_text
        qwen3_omni_moe_thinker qwen3_vl_moe qwen3_vl_moe_text""",
    ),
    ("decoder_sparse_step mlp_only_layers", dict(mlp_only_layers=[0, 1]), "flint"),
    ("first_k_dense_replace", {}, "deepseek_v2 dots1 mistral4"),
    ("first_k_dense_replace", _DENSE, "glm4_moe glm4v_moe glm4v_moe_text"),
    ("first_k_dense_replace", _DENSE_3, "deepseek_v3"),
    ("mlp_layer_types", {}, "deepseek_ocr2 deepseek_ocr2_text deepseek_v4 mellum muse_spark muse_spark_text"),
    (
        "mlp_layer_types",
        _DENSE,
        """ernie4_5_vl_moe glm4_moe_lite hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text laguna
        mimo_v2_flash""",
    ),
    ("mlp_layer_types", _DENSE_3, "beam glm5_next glm5_next_text"),
    ("mlp_layer_types first_k_dense_replace", {}, "cohere2_moe"),
    (
        "mlp_layer_types first_k_dense_replace",
        _DENSE,
        """exaone_moe kimi_linear mistral_large4 mistral_large4_text unlimited_ocr
        unlimited_ocr_text""",
    ),
    ("mlp_layer_types first_k_dense_replace", dict(first_k_dense_replace=2), "bailing_hybrid"),
    ("mlp_layer_types first_k_dense_replace", _DENSE_3, "deepseek_v32 glm_moe_dsa"),
    ("mlp_layer_types first_k_dense_replace moe_layer_freq", _DENSE, "axk1 axk2 dots3_note dots3_note_text"),
    ("mlp_layer_types moe_layers_enum", _DENSE_3, "step3p7"),
    ("mlp_layer_types moe_layer_freq", {}, "minimax_m3_vl minimax_m3_vl_text"),
    ("mlp_layer_types dense_mlp_idx", {}, "inkling_text"),
    ("layers_block_type hybrid_override_pattern", {}, "nemotron_h"),
    ("moe_layers interleave_moe_layer_step", {}, "llama4 llama4_text"),
    ("num_dense_layers", dict(num_dense_layers=1), "afmoe"),
    ("num_dense_layers", dict(num_dense_layers=2), "lfm2_moe"),
    ("moe_layer_start_index", dict(moe_layer_start_index=1), "ernie4_5_moe"),
    ("expert_layer_period", dict(expert_layer_period=2, expert_layer_offset=1), "jamba"),
    ("enable_moe_block", dict(enable_moe_block=False), "gemma4 gemma4_text"),
)
"""Fields of `sparse.WAYS` that classes read, what is taken where they are left out, and the classes' model types."""

LAYERS = {name: (fields.split(), taken) for fields, taken, names in _READ for name in names.split()}


def with_layers(config: Mapping[str, Any], said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a config says and what its class takes of which layers have experts, where that is left out or null.

    said: the config's fields and its text model's, if not the config itself.

    >>> with_layers({"model_type": "flint", "mlp_only_layers": None})["mlp_only_layers"]
    [0, 1]
    """
    said = config if said is None else said
    taken = (_layers(config) or _layers(said) or ((), {}))[1]
    return {**said, **{field: value for field, value in taken.items() if said.get(field) is None}}


def layers_with_experts(config: Mapping[str, Any], said: Mapping[str, Any], ways: str) -> set[int] | None:
    """The layers with experts, as the class that a config names reads it; of another, in these ways. None: unsaid.

    >>> config = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "first_k_dense_replace": 1}
    >>> named = config | {"architectures": ["Qwen3MoeForCausalLM"]}
    >>> layers_with_experts(named, named, EVERY), layers_with_experts(config, config, EVERY)
    ({0, 1, 2}, {1, 2})
    """
    found = _layers(config) if class_of(config) is not None else None
    if found is None:
        return None if sparse_layers(said, ways) is None else sparse_layers(with_layers(config, said), ways)
    heard = {f: v for f, v in said.items() if f in found[0] or f not in WAYS}
    return sparse_layers(with_layers(config, heard), EVERY if {*LISTS}.isdisjoint(found[0]) else ANY)


def _layers(config: Mapping[str, Any]) -> tuple[list[str], Mapping[str, Any]] | None:
    return LAYERS.get(str(config.get("model_type")))


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


@cache
def known_taken() -> dict[str, dict[str, tuple[int, list[str]]]]:
    """Model type -> where a config says a number -> what its class takes if it does not, and the names of the field."""
    return dict(json.loads(Path(__file__).with_name("taken.json").read_text()))


def with_taken(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with the numbers that its class takes where Transformers, which wrote it, left them out.

    Others leave out what a class of their own says.

    >>> with_taken({"model_type": "glm_moe_dsa", "transformers_version": "5.0.0"})["q_lora_rank"]
    2048
    """
    made = dict(config)
    if "transformers_version" in config and "auto_map" not in config:
        for path, (number, names) in known_taken().get(str(config.get("model_type")), {}).items():
            made = _put(made, path.split("."), number, names)
    return made


def _put(part: Mapping[str, Any], path: list[str], number: int, names: list[str]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {**part} if any(n in part for n in names) else {**part, first: number}
    inner = part.get(first)
    return {**part, first: _put(inner, rest, number, names)} if isinstance(inner, Mapping) else {**part}
