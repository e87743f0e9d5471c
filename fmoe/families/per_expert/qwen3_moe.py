"""Qwen3-MoE: gate, up and down matrices of every expert, one by one; no shared expert."""

from fmoe.families.kind import EXPERTS_ONLY, Family
from fmoe.families.layouts import KEPT, experts
from fmoe.families.sparse import EVERY

SIZES = dict(
    n_routed_experts="num_experts num_local_experts",
    n_activated_experts="num_experts_per_tok",
    dim="hidden_size",
    moe_inter_dim="moe_intermediate_size",
    inter_dim="intermediate_size",
)

qwen3_moe = Family(
    model_types=("qwen3_moe",),
    rules=experts() | KEPT,
    fields=SIZES | dict(norm_topk_prob="norm_topk_prob"),
    fixed=dict(softmax_before_topk=True),
    fp8=EXPERTS_ONLY + r"|.*\.self_attn\.[qkvo]_proj\.weight|.*\.mlp\.(gate|up|down)_proj\.weight",
    sparse=EVERY,
    source="Qwen/Qwen3-30B-A3B, Qwen/Qwen3-30B-A3B-FP8",
    verified="block",
)
