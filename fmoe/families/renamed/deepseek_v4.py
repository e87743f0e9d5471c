"""DeepSeek-V4 in bf16, FP8 or FP4: `ffn` with w1, w3, w2 on disk; natively `mlp`, MTP included.

The first layers choose by token id: `fmoe.moe(params, x, config, indices=params["gate.tid2eid"][token_ids])`.
"""

from fmoe.families.kind import EXPERTS_ONLY, Family
from fmoe.families.layouts import KEPT, LAYER, MLP, SHARED, block, fused
from fmoe.families.renamed.mixtral import WORDS
from fmoe.families.sparse import EVERY
from fmoe.layout.build import either, rule

MTP = "{pre}mtp.{l}."
NAMES = {
    "gate.{p=weight|tid2eid|bias}": "gate.{p=weight|tid2eid|e_score_correction_bias}",
    "shared_experts.{p=w1|w3|w2}.{rest}": "shared_experts.{p=gate_proj|up_proj|down_proj}.{rest}",
}

deepseek_v4 = Family(
    model_types=("deepseek_v4",),
    rules=either(
        "layout",
        per_expert=block(LAYER + "ffn.", MLP, NAMES, **WORDS) | block(MTP + "ffn.", MTP + "mlp.", NAMES, **WORDS),
        fused=fused() | rule(MLP + "gate.{rest}", MLP + "gate.{rest}") | rule(MLP + SHARED, MLP + SHARED),
    )
    | KEPT,
    fields=dict(
        n_routed_experts="n_routed_experts num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        n_shared_experts="n_shared_experts",
        route_scale="routed_scaling_factor",
        swiglu_limit="swiglu_limit",
    ),
    fixed=dict(score_func="sqrtsoftplus", norm_topk_prob=True, router_weights_fp32=True),
    words=dict(scoring_func={"sqrtsoftplus": {}, "sigmoid": dict(score_func="sigmoid")}),
    formats={
        "mxfp4 .scale": EXPERTS_ONLY,
        "mxfp8 .scale": None,
        "fp8 blocks .scale": r".*\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight|.*\.shared_experts\.w[123]\.weight",
    },
    sparse=EVERY,
    source="deepseek-ai/DeepSeek-V4-Flash, deepseek-ai/DeepSeek-V4-Flash-Base",
    verified="block",
)
