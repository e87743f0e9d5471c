"""MiniMax-M2, Phi-MoE, Kimi-Linear, Kimi-K3: w1, w3, w2 under `block_sparse_moe`, as Mixtral, each with its router."""

from dataclasses import replace

from fmoe.families.kind import EXPERTS_ONLY
from fmoe.families.layouts import BIAS, KEPT, LAYER, MLP, SHARED, block, first, fused, renamed
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.families.renamed.mixtral import DISK, WORDS, mixtral
from fmoe.layout.build import either, rule

BOTH = "{m=gate|shared_experts}.{rest}"
DENSE = "block_sparse_moe.{p=gate_proj|up_proj|down_proj}.weight"

minimax_m2 = replace(
    mixtral,
    model_types=("minimax_m2",),
    rules=renamed(
        {"gate.weight": "gate.weight", "e_score_correction_bias": BIAS},
        {"gate.weight": "gate.weight", "e_score_correction_bias": BIAS},
        DISK,
        **WORDS,
    )
    | KEPT,
    fixed=dict(
        score_func="sigmoid",
        force_e_score_correction_bias=True,
        norm_topk_prob=True,
        norm_topk_eps=0.0,
        router_weights_fp32=True,
    ),
    fp8=r".*\.experts\.\d+\.\w+\.weight|.*\.self_attn\.[qkvo]_proj\.weight",
    source="MiniMaxAI/MiniMax-M2",
)

phimoe = replace(
    mixtral,
    model_types=("phimoe",),
    rules=renamed({"gate.{rest}": "gate.{rest}"}, {"router.{rest}": "gate.{rest}"}, DISK, **WORDS) | KEPT,
    fields=mixtral.fields | dict(router_jitter="router_jitter_noise", input_jitter="input_jitter_noise"),
    fixed=dict(score_func="sparsemixer", router_weights_fp32=True),
    words=dict(num_experts_per_tok={2: {}}),  # its sparsemixer chooses two, whatever the config says
    source="microsoft/Phi-3.5-MoE-instruct",
)

kimi_linear = replace(
    deepseek_v3,
    model_types=("kimi_linear",),
    rules=either(
        "layout",
        per_expert=block(DISK, MLP, {BOTH: BOTH}, **WORDS) | rule(LAYER + DENSE, LAYER + DENSE),
        fused=fused() | rule(MLP + BOTH, MLP + BOTH),
    )
    | KEPT,
    fields=deepseek_v3.fields
    | dict(
        n_routed_experts="num_experts n_routed_experts",
        n_activated_experts="num_experts_per_token num_experts_per_tok",
        n_shared_experts="num_shared_experts",
        n_expert_groups="num_expert_group n_group",
        norm_topk_prob="moe_renormalize norm_topk_prob",
        moe_latent_size="routed_expert_hidden_size",
    ),
    fp8=None,
    source="moonshotai/Kimi-Linear-48B-A3B-Instruct",
)

kimi_k3 = replace(
    kimi_linear,
    model_types=("kimi_k3",),
    rules=block(DISK, MLP, {BOTH: BOTH, "routed_expert_{rest}": "routed_expert_{rest}"}, **WORDS) | KEPT,
    fields=kimi_linear.fields
    | dict(
        activation_alpha="activation_situ_beta",
        activation_limit="activation_situ_linear_beta",
        norm_eps="rms_norm_eps",
    ),
    fixed=kimi_linear.fixed | dict(activation_alpha=1.0, activation_limit=0.0),
    words=dict(
        hidden_act={
            "silu": {},
            "situ": dict(expert_activation="situ", shared_expert_activation="situ"),
        },
        latent_moe_use_norm={False: {}, True: dict(latent_norm="after")},
    ),
    formats={"mxfp4 packed": EXPERTS_ONLY},
    source="moonshotai/Kimi-K3",
    verified="keys",
)


MTP = LAYER + "transformer_layer."  # layers for multi-token prediction: the same block, one level further down
NAMES = {"gate.weight": "gate.weight", SHARED: SHARED, "e_score_correction_bias": BIAS}

minimax_m3_vl = replace(
    minimax_m2,
    model_types=("minimax_m3_vl",),
    rules=either(
        "layout",
        per_expert=block(DISK, MLP, NAMES, **WORDS) | block(MTP + "block_sparse_moe.", MTP + "mlp.", NAMES, **WORDS),
        fused=fused()
        | rule(MLP + "gate.weight", MLP + "gate.weight")
        | rule(MLP + BIAS, MLP + BIAS)
        | rule(
            MLP + "shared_experts.gate_up_proj.weight [(g s) d]",
            MLP + "shared_experts.{g=gate_proj|up_proj}.weight [s d]",
        )
        | rule(MLP + "shared_experts.down_proj.weight", MLP + "shared_experts.down_proj.weight"),
    )
    | KEPT,
    fields={f: n for f, n in minimax_m2.fields.items() if f != "input_jitter"}
    | dict(
        activation_limit="swiglu_limit",
        activation_alpha="swiglu_alpha",
        route_scale="routed_scaling_factor",
        shared_expert_inter_dim="shared_intermediate_size",
    ),
    fixed=minimax_m2.fixed
    | dict(expert_activation="swigluoai", shared_expert_activation="swigluoai", n_shared_experts=1),
    fp8=None,
    formats={"mxfp8": EXPERTS_ONLY + r"|.*\.self_attn\.[qkvo]_proj\.weight|.*\.\w+\.(gate|up|down)_proj\.weight"},
    source="MiniMaxAI/MiniMax-M3",
)
minimax_m3_text = replace(
    minimax_m3_vl,
    model_types=("minimax_m3_vl_text",),
    rules=first(minimax_m3_vl.rules, layout="fused"),
    source="the text model of MiniMaxAI/MiniMax-M3",
)
