"""LFM2-MoE, Jamba and Llama 4: experts under `feed_forward`."""

from dataclasses import replace

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT, LAYER, fused, per_expert, transposed
from fmoe.layout.build import either, rule

FFN = LAYER + "feed_forward."
X = FFN + "experts."
FIELDS = dict(
    n_routed_experts="num_experts num_local_experts",
    n_activated_experts="num_experts_per_tok",
    dim="hidden_size",
    moe_inter_dim="intermediate_size",
)

lfm2_moe = Family(
    model_types=("lfm2_moe",),
    rules=either("layout", per_expert=per_expert(X, gate_up="w1|w3", down="w2"), fused=fused(X))
    | rule(FFN + "expert_bias", FFN + "gate.e_score_correction_bias")
    | KEPT,
    fields=FIELDS
    | dict(
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
        route_scale="routed_scaling_factor",
        norm_topk_prob="norm_topk_prob",
        force_e_score_correction_bias="use_expert_bias",
    ),
    fixed=dict(score_func="sigmoid", norm_topk_eps=1e-6),
    source="LiquidAI/LFM2-8B-A1B",
    verified="block",
)

jamba = Family(
    model_types=("jamba",),
    rules=either("layout", per_expert=per_expert(X), fused=fused(X))
    | rule(FFN + "router.{rest}", FFN + "gate.{rest}")
    | KEPT,
    fields=FIELDS,
    fixed=dict(softmax_before_topk=True, router_weights_fp32=True),
    source="ai21labs/Jamba-v0.1",
    verified="block",
)

llama4 = Family(
    model_types=("llama4_text",),
    rules=transposed(X)
    | rule(FFN + "router.{rest}", FFN + "gate.{rest}")
    | rule(FFN + "shared_expert.{rest}", FFN + "shared_experts.{rest}")
    | KEPT,
    fields=FIELDS,
    fixed=dict(n_shared_experts=1, score_func="sigmoid_of_best_logits", apply_router_weight_before_up=True),
    source="meta-llama/Llama-4-Scout-17B-16E",
    verified="block",
)
llama4_multimodal = replace(llama4, model_types=("llama4",))
