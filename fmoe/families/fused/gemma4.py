"""Gemma 4: stacked experts beside a dense MLP, directly in the layer; the scale of each expert stays its own tensor.

Its router sees the residual, its experts the norm of it: `fmoe.moe(params, norm(x), config, routing=fmoe.route(params,
x, config))` is what a layer adds. That norm, and the one after, are the layer's.
"""

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
        norm_eps="rms_norm_eps",
    ),
    fixed=dict(softmax_before_topk=True, norm_topk_prob=True, router_norm=True, scaled_logits=True),
    activations={"gelu_pytorch_tanh": "geglu"},
    activation_field="hidden_activation",
    source="google/gemma-4-26B-A4B",
    verified="block",
)

gemma4_multimodal = replace(gemma4_moe, model_types=("gemma4",))
diffusion_gemma = replace(gemma4_moe, model_types=("diffusion_gemma",), verified="keys")
