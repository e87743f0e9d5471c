"""LongCat-Flash: experts one by one, and in memory zero experts beside them, which have no weights."""

from dataclasses import replace

from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.families.sparse import EVERY

longcat_flash = replace(
    deepseek_v3,
    model_types=("longcat_flash",),
    fields=dict(
        n_routed_experts="n_routed_experts num_experts",
        n_activated_experts="moe_topk num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="expert_ffn_hidden_size",
        inter_dim="ffn_hidden_size",
    ),
    fixed=dict(score_func="softmax over experts and zero experts"),
    fp8=None,
    sparse=EVERY,
    source="meituan-longcat/LongCat-Flash-Chat",
    verified="experts",
)
