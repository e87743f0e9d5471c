"""OLMoE and those like it: experts one by one, a softmax router, no shared expert."""

from dataclasses import replace

from fmoe.families.per_expert.qwen2_moe import qwen2_moe
from fmoe.families.per_expert.qwen3_moe import qwen3_moe
from fmoe.families.router import AFTER
from fmoe.families.sparse import EVERY

olmoe = replace(
    qwen3_moe,
    model_types=("olmoe", "flex_olmo"),
    fields=qwen3_moe.fields | dict(moe_inter_dim="intermediate_size"),
    sparse=EVERY,
    source="allenai/OLMoE-1B-7B-0924, allenai/FlexOlmo-7x7B-1T",
)

cohere2_moe = replace(
    olmoe,
    model_types=("cohere2_moe",),
    fields=olmoe.fields | dict(n_shared_experts="num_shared_experts"),
    fixed=dict(norm_topk_prob=True, norm_topk_eps=0.0),
    words=dict(
        expert_selection_fn={"softmax": AFTER, "sigmoid": dict(score_func="sigmoid_of_best_logits")},
        shared_expert_combination_strategy={"average": dict(output_scale=0.5), "sum": {}},
    ),
    source="CohereLabs/command-a-plus-05-2026",
)

mellum = replace(qwen3_moe, model_types=("mellum",), source="JetBrains/Mellum2-12B-A2.5B-Base")

qwen3_omni_moe_thinker = replace(
    qwen3_moe,
    model_types=("qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
    source="the thinker of Qwen/Qwen3-Omni-30B-A3B-Instruct",
)

qwen3_omni_moe = replace(  # thinker and talker, each with sizes of its own
    qwen2_moe, model_types=("qwen3_omni_moe",), source="Qwen/Qwen3-Omni-30B-A3B-Instruct", verified="keys"
)
