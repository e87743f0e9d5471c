"""Hunyuan: experts one by one, shared ones under `shared_mlp`, the router under names of its own."""

from dataclasses import replace

from fmoe.families.layouts import BIAS, KEPT, MLP, SHARED, experts, renamed
from fmoe.families.per_expert.deepseek_v3 import UNGROUPED, deepseek_v3
from fmoe.families.per_expert.qwen3_moe import SIZES, qwen3_moe
from fmoe.families.sparse import EVERY
from fmoe.layout.build import rule

hunyuan_v1_moe = replace(
    qwen3_moe,
    model_types=("hunyuan_v1_moe",),
    rules=experts()
    | rule(MLP + "gate.wg.weight", MLP + "gate.weight")
    | rule(MLP + "shared_mlp.{rest}", MLP + SHARED)
    | KEPT,
    fields=SIZES
    | dict(
        n_activated_experts="moe_topk num_experts_per_tok",
        moe_inter_dim="moe_intermediate_size intermediate_size",
        n_shared_experts="num_shared_expert",
    ),
    fixed=dict(softmax_before_topk=True, norm_topk_prob=True, n_shared_experts=1),
    fp8=None,
    sparse=EVERY,
    source="tencent/Hunyuan-A13B-Instruct",
)

hy_v3 = replace(
    deepseek_v3,
    model_types=("hy_v3",),
    rules=renamed(
        {"router.gate.weight": "gate.weight", "expert_bias": BIAS, "shared_mlp.{rest}": SHARED},
        {"gate.weight": "gate.weight", "e_score_correction_bias": BIAS, SHARED: SHARED},
    )
    | KEPT,
    fields=UNGROUPED
    | dict(
        n_routed_experts="num_experts n_routed_experts",
        n_shared_experts="num_shared_experts",
        route_scale="router_scaling_factor",
    ),
    fp8=None,
    source="tencent/Hy3-preview",
)
hy_mt2 = replace(
    hy_v3, model_types=("hy_mt2",), source="as Hy3: no checkpoint is named by Transformers", verified="keys"
)
