"""Qwen3.5-MoE: experts fused [E, out, in] in the decoder; in MTP fused or one by one; both one by one in FP8.

Qwen3.8-Flash-Next: its table of n-grams is one tensor natively, and on disk as many shards of rows as its config says.
"""

from dataclasses import replace

from fmoe.families.kind import EXPERTS_ONLY, Family
from fmoe.families.layouts import KEPT, fused, per_expert
from fmoe.families.sparse import EVERY
from fmoe.layout.build import either, rule

DECODER = "{pre=model.language_model.|model.|language_model.|}layers.{l}.mlp.experts."
MTP = "mtp.layers.{l}.mlp.experts."
LINEAR = "{pre}layers.{l}.linear_attn."

qwen3_5_moe = Family(
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    rules=either("layout", quantized="per_expert", fused=fused(DECODER), per_expert=per_expert(DECODER))
    | either("mtp_layout", quantized="per_expert", fused=fused(MTP), per_expert=per_expert(MTP))
    | rule("{pre}layers.{l}.mlp.shared_expert.{rest}", "{pre}layers.{l}.mlp.shared_experts.{rest}")
    | rule("mtp.fc.{rest}", "mtp.layers.0.eh_proj.{rest}")
    | rule("mtp.pre_fc_norm_embedding.{rest}", "mtp.layers.0.enorm.{rest}")
    | rule("mtp.pre_fc_norm_hidden.{rest}", "mtp.layers.0.hnorm.{rest}")
    | rule("mtp.norm.{rest}", "mtp.layers.0.final_layernorm.{rest}")
    | rule(LINEAR + "{p=A_log|dt_bias}", LINEAR + "_fp32_params.{p=A_log|dt_bias}")
    | either(
        "lm_head",
        outside=rule("lm_head.{rest}", "lm_head.{rest}"),
        inside=rule("model.lm_head.{rest}", "lm_head.{rest}"),
    )
    | KEPT,
    fields=dict(
        n_routed_experts="num_experts num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        shared_expert_inter_dim="shared_expert_intermediate_size",
    ),
    fixed=dict(n_shared_experts=1, shared_expert_gate=True, softmax_before_topk=True, norm_topk_prob=True),
    fp8=EXPERTS_ONLY,
    sparse=EVERY,
    source="Qwen/Qwen3.5-35B-A3B, Qwen/Qwen3.5-35B-A3B-FP8",
    verified="block",
)

NGRAMS = "{pre}layers.{l}.ple.ple_embedding.ngram_embedding."

qwen3_8_flash_next = replace(
    qwen3_5_moe,
    model_types=("qwen3_8_flash_next", "qwen3_8_flash_next_text"),
    rules=rule(NGRAMS + "shard_{k}.weight [r w]", NGRAMS + "weight [(k r) w]", k=128) | qwen3_5_moe.rules,
    sizes=dict(k="split_ngram_parts"),
    source="Qwen3.8-Flash-Next, as Automodel 0.7.0 reads it",
    verified="keys",
)
