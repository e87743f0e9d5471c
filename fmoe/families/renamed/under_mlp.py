"""Experts one by one under `mlp`, with a router and shared experts under names of their own, natively as everyone's."""

from dataclasses import replace

from fmoe.families.layouts import BIAS, KEPT, MLP, SHARED, experts, renamed
from fmoe.families.per_expert.deepseek_v3 import UNGROUPED, deepseek_v3
from fmoe.families.sparse import EVERY
from fmoe.layout.build import rule

laguna = replace(
    deepseek_v3,
    model_types=("laguna",),
    rules=renamed({"experts.e_score_correction_bias": BIAS, "shared_expert.{rest}": SHARED}) | KEPT,
    fields=UNGROUPED
    | dict(
        n_routed_experts="num_experts n_routed_experts",
        shared_expert_inter_dim="shared_expert_intermediate_size",
        route_scale="moe_routed_scaling_factor routed_scaling_factor",
        logit_softcap="moe_router_logit_softcapping",
    ),
    fixed=deepseek_v3.fixed | dict(n_shared_experts=1, norm_topk_eps=0.0),
    fp8=None,
    source="poolside/laguna-XS.2",
)

ernie4_5_moe = replace(
    deepseek_v3,
    model_types=("ernie4_5_moe",),
    rules=renamed(
        {"moe_statics.e_score_correction_bias [1 e]": BIAS + " [e]"},
        {"gate.moe_statics.e_score_correction_bias [1 e]": BIAS + " [e]"},
    )
    | KEPT,
    fields=dict(
        n_routed_experts="moe_num_experts num_experts",
        n_activated_experts="moe_k num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
        n_shared_experts="moe_num_shared_experts",
        norm_topk_min="moe_norm_min",
    ),
    fixed=dict(
        score_func="softmax_with_bias",
        norm_topk_prob=True,
        norm_topk_eps=0.0,
        norm_topk_min=1e-12,
        router_weights_fp32=True,
    ),
    fp8=None,
    source="baidu/ERNIE-4.5-21B-A3B-PT",
)

exaone_moe = replace(
    deepseek_v3,
    model_types=("exaone_moe",),
    rules=renamed({"e_score_correction_bias": BIAS}) | KEPT,
    fields=deepseek_v3.fields | dict(n_routed_experts="num_experts", n_shared_experts="num_shared_experts"),
    fp8=None,
    source="LGAI-EXAONE/K-EXAONE-236B-A23B",
)

afmoe = replace(
    deepseek_v3,
    model_types=("afmoe",),
    rules=experts()
    | rule(MLP + "router.gate.weight", MLP + "gate.weight")
    | rule(MLP + "expert_bias", MLP + BIAS)
    | KEPT,
    fields=UNGROUPED
    | dict(
        n_routed_experts="num_experts",
        n_shared_experts="num_shared_experts",
        route_scale="route_scale",
    ),
    fp8=None,
    source="arcee-ai/Trinity-Mini",
)

bailing_hybrid = replace(
    deepseek_v3,
    model_types=("bailing_hybrid",),
    rules=renamed({"gate.expert_bias": BIAS}) | KEPT,
    fields=deepseek_v3.fields
    | dict(
        n_routed_experts="num_experts",
        n_activated_experts="num_experts_per_tok num_experts_per_token",
        n_shared_experts="num_shared_experts",
        n_expert_groups="n_group num_expert_group",
        norm_topk_prob="norm_topk_prob moe_renormalize",
    ),
    fp8=None,
    source="inclusionAI/Ling-3.0-Flash",
)
ling_v2 = replace(
    bailing_hybrid,
    model_types=("bailing_moe", "bailing_moe_v2"),
    source="inclusionAI/Ling-mini-2.0",
    verified="keys",
)

sarvam_moe = replace(  # Bailing's names: `mlp.gate.expert_bias`, `word_embeddings`, `query_key_value`
    ling_v2,
    model_types=("sarvam_moe",),
    fields=ling_v2.fields
    | dict(n_routed_experts="num_experts n_routed_experts", n_shared_experts="num_shared_experts n_shared_experts"),
    source="the class sarvam_moe of Transformers 5.24",
    verified="block",
)

kolibri1 = replace(
    deepseek_v3,
    model_types=("kolibri1",),
    rules=renamed({"{pre}layers.{l}.moe.router.expert_bias": BIAS}) | KEPT,
    fields=dict(
        n_routed_experts="num_experts num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        shared_expert_inter_dim="shared_expert_intermediate_size",
        norm_topk_prob="norm_topk_prob",
    ),
    fixed=dict(
        n_shared_experts=1,
        score_func="sigmoid_of_best_logits",
        norm_topk_eps=0.0,
        force_e_score_correction_bias=True,
        router_weights_fp32=True,
    ),
    fp8=None,
    sparse=EVERY,
    source="Aleph-Alpha/Kolibri-1",
)
