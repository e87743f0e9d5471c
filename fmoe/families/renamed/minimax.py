"""MiniMax-M2, Phi-MoE, Kimi-Linear, Kimi-K3: w1, w3, w2 under `block_sparse_moe`, as Mixtral, each with its router."""

from dataclasses import replace

from fmoe.families.kind import EXPERTS_ONLY
from fmoe.families.layouts import EXPERTS, KEPT, MLP, fused, per_expert
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.families.renamed.mixtral import DISK, mixtral
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either, rule

BIAS = MLP + "gate.e_score_correction_bias"
WEIGHT = MLP + "gate.weight"
ONE_BY_ONE = per_expert(DISK + "experts.", EXPERTS, "w1|w3", "w2")

minimax_m2 = replace(
    mixtral,
    model_types=("minimax_m2",),
    rules=either(
        "layout",
        per_expert=ONE_BY_ONE | rule(DISK + "gate.weight", WEIGHT) | rule(DISK + "e_score_correction_bias", BIAS),
        fused=fused() | rule(WEIGHT, WEIGHT) | rule(MLP + "e_score_correction_bias", BIAS),
    )
    | KEPT,
    fixed=dict(score_func="sigmoid", force_e_score_correction_bias=True, norm_topk_prob=True, router_weights_fp32=True),
    fp8=r".*\.experts\.\d+\.\w+\.weight|.*\.self_attn\.[qkvo]_proj\.weight",
    source="MiniMaxAI/MiniMax-M2",
)

phimoe = replace(
    mixtral,
    model_types=("phimoe",),
    rules=either(
        "layout",
        per_expert=ONE_BY_ONE | rule(DISK + "gate.{rest}", MLP + "gate.{rest}"),
        fused=fused() | rule(MLP + "router.{rest}", MLP + "gate.{rest}"),
    )
    | KEPT,
    fixed=dict(score_func="sparsemixer"),
    source="microsoft/Phi-3.5-MoE-instruct",
    verified="experts",
)

kimi_linear = replace(
    deepseek_v3,
    model_types=("kimi_linear",),
    rules=either(
        "layout",
        per_expert=ONE_BY_ONE
        | rule(DISK + "{m=gate|shared_experts}.{rest}", MLP + "{m=gate|shared_experts}.{rest}")
        | rule(DISK + "{p=gate_proj|up_proj|down_proj}.weight", DISK + "{p=gate_proj|up_proj|down_proj}.weight"),
        fused=fused() | rule(MLP + "{m=gate|shared_experts}.{rest}", MLP + "{m=gate|shared_experts}.{rest}"),
    )
    | KEPT,
    fields=deepseek_v3.fields
    | dict(
        n_routed_experts="num_experts n_routed_experts",
        n_activated_experts="num_experts_per_token num_experts_per_tok",
        n_shared_experts="num_shared_experts",
        n_expert_groups="num_expert_group n_group",
        norm_topk_prob="moe_renormalize norm_topk_prob",
    ),
    fp8=None,
    source="moonshotai/Kimi-Linear-48B-A3B-Instruct",
)

kimi_k3 = replace(
    kimi_linear,
    model_types=("kimi_k3",),
    rules=ONE_BY_ONE
    | rule(DISK + "{m=gate|shared_experts}.{rest}", MLP + "{m=gate|shared_experts}.{rest}")
    | rule(DISK + "routed_expert_{rest}", MLP + "routed_expert_{rest}")
    | KEPT,
    fixed=kimi_linear.fixed | dict(score_func="sigmoid, in a latent space with a norm"),
    formats={"mxfp4 packed": EXPERTS_ONLY},
    source="moonshotai/Kimi-K3",
    verified="keys",
)


def mtp(hf: str, native: str) -> Adapter:
    """MiniMax-M3's layers for multi-token prediction: the same block, one level further down."""
    return (
        per_expert(hf + "experts.", native + "experts.", "w1|w3", "w2")
        | rule(hf + "gate.weight", native + "gate.weight")
        | rule(hf + "shared_experts.{rest}", native + "shared_experts.{rest}")
        | rule(hf + "e_score_correction_bias", native + "gate.e_score_correction_bias")
    )


M3_MTP = "{pre}layers.{l}.transformer_layer."

minimax_m3_vl = replace(
    minimax_m2,
    model_types=("minimax_m3_vl_text",),
    rules=either(
        "layout",
        per_expert=ONE_BY_ONE
        | rule(DISK + "gate.weight", WEIGHT)
        | rule(DISK + "shared_experts.{rest}", MLP + "shared_experts.{rest}")
        | rule(DISK + "e_score_correction_bias", BIAS)
        | mtp(M3_MTP + "block_sparse_moe.", M3_MTP + "mlp."),
        fused=fused()
        | rule(WEIGHT, WEIGHT)
        | rule(BIAS, BIAS)
        | rule(MLP + "shared_experts.{rest}", MLP + "shared_experts.{rest}"),
    )
    | KEPT,
    fields=minimax_m2.fields | dict(activation_limit="swiglu_limit", activation_alpha="swiglu_alpha"),
    fixed=minimax_m2.fixed | dict(expert_activation="swigluoai"),
    fp8=None,
    formats={"mxfp8": EXPERTS_ONLY + r"|.*\.self_attn\.[qkvo]_proj\.weight|.*\.\w+\.(gate|up|down)_proj\.weight"},
    source="the text model of MiniMaxAI/MiniMax-M3",
    verified="experts",
)
minimax_m3_multimodal = replace(minimax_m3_vl, model_types=("minimax_m3_vl",), verified="keys")
