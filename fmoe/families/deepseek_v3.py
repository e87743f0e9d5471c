"""DeepSeek-V3 in bf16 and FP8: experts one by one in every sparse layer, the MTP layer (the last) among them."""

from fmoe.families.family import Family
from fmoe.families.layouts import KEPT, experts

deepseek_v3 = Family(
    model_types=("deepseek_v3",),
    rules=experts() | KEPT,
    fields=dict(
        n_routed_experts="n_routed_experts num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
        n_shared_experts="n_shared_experts",
        n_expert_groups="n_group",
        n_limited_groups="topk_group",
        route_scale="routed_scaling_factor",
        norm_topk_prob="norm_topk_prob",
    ),
    fixed=dict(
        score_func="sigmoid",
        force_e_score_correction_bias=True,
        norm_topk_prob=True,
        router_weights_fp32=True,
    ),
    fp8=r".*\.(self_attn|mlp|experts\.\d+|shared_experts)\.\w+_proj(_with_mqa)?\.weight",
    source="deepseek-ai/DeepSeek-V3",
)
