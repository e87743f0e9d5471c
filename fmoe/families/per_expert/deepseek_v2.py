"""DeepSeek-V2: as V3 on disk, with a softmax router, without correction bias."""

from dataclasses import replace

from fmoe.families.per_expert.deepseek_v3 import deepseek_v3

deepseek_v2 = replace(
    deepseek_v3,
    model_types=("deepseek_v2",),
    fields={field: names for field, names in deepseek_v3.fields.items() if field != "norm_topk_prob"},
    fixed=dict(softmax_before_topk=True, router_weights_fp32=True),
    words=dict(topk_method={"greedy": dict(n_expert_groups=1, n_limited_groups=1), "group_limited_greedy": {}}),
    source="deepseek-ai/DeepSeek-V2-Lite",
)
