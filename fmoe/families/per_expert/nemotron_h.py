"""Nemotron-H: up and down alone (squared ReLU), in `mixer`; on disk under `backbone`, natively under `model`."""

from dataclasses import replace

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT, fused, per_expert
from fmoe.layout.build import either, keep, rule

MIXER = "{pre}layers.{l}.mixer."

PREFIX = either(
    "prefix",
    backbone=rule("backbone.embeddings.{rest}", "model.embed_tokens.{rest}")
    | rule("backbone.norm_f.{rest}", "model.norm.{rest}")
    | rule("backbone.layers.{rest}", "model.layers.{rest}"),
    model=rule("model.embeddings.{rest}", "model.embed_tokens.{rest}")
    | rule("model.norm_f.{rest}", "model.norm.{rest}")
    | rule("model.layers.{rest}", "model.layers.{rest}"),
) | keep("{rest}")

nemotron_h = Family(
    model_types=("nemotron_h",),
    rules=PREFIX
    >> (
        either(
            "layout",
            per_expert=per_expert(MIXER + "experts.", gate_up="up_proj"),
            fused=fused(MIXER + "experts.", gated=False),
        )
        | rule(MIXER + "{p=A_log|dt_bias|D}", MIXER + "_fp32_params.{p=A_log|dt_bias|D}")
        | KEPT
    ),
    fields=dict(
        n_routed_experts="n_routed_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
        moe_latent_size="moe_latent_size",
        shared_expert_inter_dim="moe_shared_expert_intermediate_size",
        n_expert_groups="n_group",
        n_limited_groups="topk_group",
        route_scale="routed_scaling_factor",
        norm_topk_prob="norm_topk_prob",
    ),
    fixed=dict(
        n_shared_experts=1,
        shared_expert_activation="relu2",
        score_func="sigmoid",
        force_e_score_correction_bias=True,
        router_weights_fp32=True,
    ),
    activations={"relu2": "relu2"},
    activation_field="mlp_hidden_act",
    source="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    verified="block",
)
nemotron_omni = replace(
    nemotron_h,
    model_types=("nemotron_h_omni",),
    source="nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16",
    verified="keys",
)
