"""DeepSeek-V3 in bf16 and FP8: experts one by one in every sparse layer, the MTP layer (the last) among them."""

from dataclasses import replace

from fmoe.families.kind import EXPERTS_ONLY, Family
from fmoe.families.layouts import KEPT, experts, first

GROUPS = ("n_expert_groups", "n_limited_groups")

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
    verified="block",
)

UNGROUPED = {f: n for f, n in deepseek_v3.fields.items() if f not in (*GROUPS, "norm_topk_prob")}
"""Of families whose router knows no groups, and always divides by the sum: a config that says otherwise is refused."""

deepseek_v32 = replace(
    deepseek_v3,
    model_types=("deepseek_v32", "glm_moe_dsa"),
    fp8=f"{deepseek_v3.fp8}|" + r".*\.indexer\.(wq_b|wk)\.weight",
    source="deepseek-ai/DeepSeek-V3.2-Exp, zai-org/GLM-5",
)

glm4_moe = replace(
    deepseek_v3,
    model_types=("glm4_moe", "glm4_moe_lite", "glm4v_moe", "dots1", "solar_open"),
    source="zai-org/GLM-4.5, GLM-4.5V, rednote-hilab/dots.llm1.base, upstage/Solar-Open-100B",
)
glm4v_moe_text = replace(
    glm4_moe,
    model_types=("glm4v_moe_text",),
    rules=first(glm4_moe.rules, layout="fused"),
    source="the class Glm4vMoeTextModel of Transformers 5.24",
)

mimo_v2_flash = replace(
    deepseek_v3,
    model_types=("mimo_v2_flash",),
    fp8=rf"(?!.*\.o_proj\.)(?:{deepseek_v3.fp8})",
    source="XiaomiMiMo/MiMo-V2-Flash",
)

kimi_k25_vl = replace(
    deepseek_v3,
    model_types=("kimi_k25",),
    fp8=None,
    formats={"int4": EXPERTS_ONLY},
    source="moonshotai/Kimi-K2.5, moonshotai/Kimi-K2.6",
    verified="keys",
)

mimo_v2 = replace(  # QKV of attention, fused and quantised shard by shard, is passed on as it is
    mimo_v2_flash,
    model_types=("mimo_v2",),
    source="MiMo-V2.5 and MiMo-V2.5-Pro, as Automodel 0.7.0 reads them",
    verified="keys",
)

sarvam_mla = replace(deepseek_v3, model_types=("sarvam_mla",), source="the class sarvam_mla of Transformers 5.24")
