"""Qwen2-MoE, Qwen3-Next, Flint: one shared expert, `shared_expert` on disk and `shared_experts` natively."""

from dataclasses import replace

from fmoe.families.kind import EXPERTS_ONLY, Family
from fmoe.families.layouts import KEPT, MLP, experts
from fmoe.families.sparse import EVERY
from fmoe.layout.build import rule

LINEAR = "{pre}layers.{l}.linear_attn."
SHARED = rule(MLP + "shared_expert.{rest}", MLP + "shared_experts.{rest}")

qwen2_moe = Family(
    model_types=("qwen2_moe",),
    rules=experts() | SHARED | KEPT,
    fields=dict(
        n_routed_experts="num_experts num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
        shared_expert_inter_dim="shared_expert_intermediate_size",
        norm_topk_prob="norm_topk_prob",
    ),
    fixed=dict(n_shared_experts=1, shared_expert_gate=True, softmax_before_topk=True),
    fp8=EXPERTS_ONLY,
    sparse=EVERY,
    source="Qwen/Qwen1.5-MoE-A2.7B",
    verified="block",
)

qwen3_next = replace(
    qwen2_moe,
    model_types=("qwen3_next",),
    rules=experts() | SHARED | rule(LINEAR + "{p=A_log|dt_bias}", LINEAR + "_fp32_params.{p=A_log|dt_bias}") | KEPT,
    fixed=qwen2_moe.fixed | dict(norm_topk_prob=True),
    source="Qwen/Qwen3-Next-80B-A3B-Instruct",
)

qwen4_exp = replace(
    qwen2_moe,
    model_types=("qwen4_exp", "qwen4_exp_text"),
    sparse=EVERY,
    source="Qwen/Qwen4-Exp",
)

flint = replace(
    qwen2_moe,
    model_types=("flint",),
    fixed=dict(
        n_shared_experts=1, score_func="sigmoid", norm_topk_prob=True, norm_topk_eps=0.0, router_weights_fp32=True
    ),
    fp8=None,
    source="RecursiveSI/flint",
)
