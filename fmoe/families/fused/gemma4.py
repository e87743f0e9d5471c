"""Gemma 4: stacked experts beside a dense MLP, directly in the layer; the scale of each expert stays its own tensor."""

from dataclasses import replace

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT, fused
from fmoe.layout.build import rule

LAYER = "{pre}layers.{l}."

gemma4_moe = Family(
    model_types=("gemma4_text",),
    rules=fused(LAYER + "experts.", LAYER + "moe.experts.")
    | rule(LAYER + "router.{rest}", LAYER + "moe.gate.{rest}")
    | KEPT,
    fields=dict(
        n_routed_experts="num_experts",
        n_activated_experts="top_k_experts",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
    ),
    fixed=dict(score_func="softmax of normed and scaled tokens"),
    activations={"gelu_pytorch_tanh": "geglu"},
    activation_field="hidden_activation",
    source="google/gemma-4-26B-A4B",
    verified="experts",
)

gemma4_multimodal = replace(gemma4_moe, model_types=("gemma4", "diffusion_gemma"), verified="keys")
