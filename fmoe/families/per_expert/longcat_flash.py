"""LongCat-Flash: experts one by one, and zero experts after them, which need no weights.

As published they have none; Transformers writes gate and up of each: those that are there go along.
"""

from dataclasses import replace

from fmoe.families.layouts import BIAS, EXPERTS, KEPT, MLP, fused, per_expert
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.families.sparse import EVERY
from fmoe.layout.build import either, rule

GATE_UP = "{g=gate_proj|up_proj}.weight"
ZERO = rule(EXPERTS + "{k=z+E}." + GATE_UP, MLP + "zero_experts.{z}." + GATE_UP)

longcat_flash = replace(
    deepseek_v3,
    model_types=("longcat_flash",),
    rules=either("layout", per_expert=per_expert() | ZERO, fused=fused())
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
