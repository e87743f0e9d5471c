"""What a config says of a router: what a family does not say, or does not hear, is refused by name, and not guessed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fmoe.types import MoEConfig

if TYPE_CHECKING:
    from fmoe.families.kind import Family

AFTER = dict(score_func="softmax", softmax_before_topk=False)
"""A softmax over the K experts chosen."""
SCORING = ("scoring_func", "score_func", "score_function", "moe_router_activation_func", "router_score_function")
NORMED = ("norm_topk_prob", "moe_renormalize", "route_norm", "norm_expert_weight")
SCALED = ("routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_routed_scaling_factor")
BIASED, GREEDY = "noaux_tc", ("greedy", "group_limited_greedy")  # dots1 writes the first as scoring_func too
GROUPED = ("n_group", "num_expert_group", "moe_router_num_groups")
SET = (
    *("swiglu_limit", "swiglu_limits", "swiglu_limits_shared", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap"),
    *("moe_router_logit_softcapping", "router_logit_softcapping", "router_jitter_noise", "input_jitter_noise"),
    *("moe_jitter_eps", "moe_drop_tokens", "moe_random_routing_dropped_token", "zero_expert_num"),
)
"""Fields that change what a block computes wherever they are set: clamps, caps, noise, tokens that are dropped."""


def unsaid(
    family: str, fixed: Mapping[str, Any], fields: Mapping[str, str], values: Mapping[str, Any]
) -> dict[str, str]:
    """A `score_func` that `route` and `moe` refuse by name, where a family leaves its router to be guessed; else {}.

    values: MoEConfig's fields, as far as fixed and the config say them. Of a softmax the order counts too: over all
    experts before the choice of the top k, or over those chosen.

    >>> unsaid("mine", {}, {}, {})
    {'score_func': 'unsaid by mine: score_func in its fixed or fields says it'}
    >>> unsaid("mine", {"score_func": "sigmoid"}, {}, {"score_func": "sigmoid"})
    {}
    """
    ordered = "softmax_before_topk" in {**fixed, **fields, **values}
    score = values.get("score_func") or ("softmax" if ordered and "score_func" not in fields else None)
    if score is not None and (score != "softmax" or ordered):
        return {}
    what, field = ("", "score_func") if score is None else ("softmax before or after top k, ", "softmax_before_topk")
    return {"score_func": f"{what}unsaid by {family}: {field} in its fixed or fields says it"}


def spoken(config: Mapping[str, Any], words: Mapping[str, Mapping[Any, Mapping[str, Any]]]) -> dict[str, Any] | str:
    """MoEConfig's fields that a family's words make of a config, or which of its values is no word.

    >>> spoken({"act": "silu"}, {"act": {"silu": {"a": 1}}}), spoken({"act": "tanh"}, {"act": {"silu": {}}})
    ({'a': 1}, "act='tanh': expected one of silu")
    """
    made: dict[str, Any] = {}
    for name, table in words.items():
        value = config.get(name, None if None not in table else next(iter(table)))
        value = next(iter(table)) if value is None and None not in table else value
        if isinstance(value, list | dict) or value not in table:
            return f"{name}={value!r}: expected one of {', '.join(map(str, table))}"
        made |= table[value]
    return made


def unheard(config: Mapping[str, Any], family: "Family", made: MoEConfig) -> str:
    """Which field of a config would change the layer and says something else than the layer made; "" if none does.

    A field that the family reads is heard, and what says the same as the family, or nothing (None, False, 0), is too.

    >>> from fmoe.families import family
    >>> sizes = dict(num_experts=4, num_experts_per_tok=2, hidden_size=6, moe_intermediate_size=4)
    >>> kind = family("qwen3_moe")
    >>> unheard(sizes | {"n_group": 2}, kind, kind.adapter(sizes).moe_config)
    'n_group=2: qwen3_moe has n_expert_groups=1, expected the same or no such field'
    """
    read = {n for names in family.fields.values() for n in names.split()} | {*family.words, *family.unsaid}
    scores = (made.score_func.split("_")[0], made.score_func, BIASED)
    for field, names, fits in (
        ("score_func", SCORING, lambda v: v in scores),
        ("norm_topk_prob", NORMED, lambda v: v == made.norm_topk_prob or _sum_is_one(made)),
        ("route_scale", SCALED, lambda v: v in (made.route_scale, 1)),
        ("n_expert_groups", GROUPED, lambda v: v in (made.n_expert_groups, 1)),
        ("n_expert_groups", ("use_grouped_topk",), lambda v: v or made.n_expert_groups == 1),
        ("n_expert_groups", ("topk_method",), lambda v: v == BIASED or v in GREEDY and made.n_expert_groups == 1),
        ("", SET, lambda v: not (any(v) if isinstance(v, list) else v)),
    ):
        quiet = (None,) if field in ("norm_topk_prob", "n_expert_groups") else (None, False, 0)
        for name in names:
            value = config.get(name)
            ours = not field or " " not in made.score_func  # of a router that is none of ours nothing is said
            if ours and name not in read and not any(value is q for q in quiet) and not fits(value):
                has = f"has {field}={getattr(made, field)!r}" if field else "does not compute it"
                return f"{name}={value!r}: {family.model_types[0]} {has}, expected the same or no such field"
    for field in ("swiglu_limit", "activation_limit", "activation_alpha"):
        said = {n: config[n] for n in family.fields.get(field, "").split() if n in config}
        for name, value in said.items() if family.fixed.get(field, 1) > 0 else ():
            if isinstance(value, int | float) and value <= 0:
                return f"{name}={value!r}: a limit of 0 leaves nothing, expected a positive number"
    return ""


def _sum_is_one(made: MoEConfig) -> bool:
    """Whether a token's weights sum to 1 by themselves."""
    return made.score_func == "softmax" and not made.softmax_before_topk
