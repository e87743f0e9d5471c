"""LongCat-Flash: experts one by one, and in memory zero experts beside them, which have no weights."""

from dataclasses import replace

from fmoe.families.layouts import BIAS, KEPT, MLP, experts
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.families.sparse import EVERY
from fmoe.layout.build import rule

longcat_flash = replace(
    deepseek_v3,
    model_types=("longcat_flash",),
    rules=experts()
    | rule(MLP + "router.classifier.{p=weight|bias}", MLP + "gate.{p=weight|bias}")
    | rule(MLP + "router.e_score_correction_bias", MLP + BIAS)
    | KEPT,
    fields=dict(
        n_routed_experts="n_routed_experts num_experts",
        n_activated_experts="moe_topk num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="expert_ffn_hidden_size",
        inter_dim="ffn_hidden_size",
        n_zero_experts="zero_expert_num",
        route_scale="routed_scaling_factor",
    ),
    fixed=dict(score_func="softmax_with_bias", router_weights_fp32=True),
    unsaid=dict(router_bias="is made by Transformers, and not added: what it means is not known"),
    words=dict(zero_expert_type={"identity": {}}),
    fp8=None,
    sparse=EVERY,
    source="meituan-longcat/LongCat-Flash-Chat",
)
