"""Step-3.5: gate, up and down of all experts, each one tensor [experts, out, in], under `moe`."""

from dataclasses import replace

from fmoe.families.kind import Family
from fmoe.families.layouts import BIAS, EXPERTS, KEPT, MLP, fused
from fmoe.layout.build import either, keep, rule, together

X = "{pre}layers.{l}.moe."
PUBLISHED = together(
    rule(X + "{g=gate|up}_proj.weight [e i d]", X + "experts.gate_and_up_projs [e d (g i)]"),
    rule(X + "down_proj.weight [e d i]", X + "experts.down_projs [e i d]"),
)

step3p5 = Family(
    model_types=("step3p5",),
    rules=PUBLISHED
    | either(
        "router_bias",
        published=rule(X + "router_bias", X + "gate.e_score_correction_bias"),
        native=rule(X + "gate.e_score_correction_bias", X + "gate.e_score_correction_bias"),
        legacy=rule(X + "router_bias", X + "gate.bias"),  # native checkpoints of before the correction bias
        legacy_native=rule(X + "gate.bias", X + "gate.bias"),
    )
    | keep(X + "gate.weight")
    | KEPT,
    fields=dict(
        n_routed_experts="moe_num_experts n_routed_experts",
        n_activated_experts="moe_top_k num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        inter_dim="intermediate_size",
        shared_expert_inter_dim="share_expert_dim share_expert_dims",
        route_scale="moe_router_scaling_factor",
        norm_topk_prob="norm_expert_weight",
    ),
    fixed=dict(
        n_shared_experts=1,
        score_func="sigmoid",
        norm_topk_prob=True,
        norm_topk_eps=0.0,
        force_e_score_correction_bias=True,
        router_weights_fp32=True,
    ),
    unsaid=dict(
        swiglu_limits="clamps after silu, layer by layer: no expert_activation does",
        swiglu_limits_shared="clamps shared experts after silu, layer by layer: no expert_activation does",
    ),
    source="stepfun-ai/Step-3.5-Flash",
    verified="block",
)
step3p7 = replace(
    step3p5,
    model_types=("step3p7",),
    rules=either(
        "layout",
        published=PUBLISHED | rule(X + "router_bias", X + BIAS) | keep("{pre}layers.{l}.share_expert.{rest}"),
        fused=fused(EXPERTS, X + "experts.")
        | rule(MLP + BIAS, X + BIAS)
        | rule(MLP + "gate.weight", X + "gate.weight")
        | rule(MLP + "shared_experts.{rest}", "{pre}layers.{l}.share_expert.{rest}"),
    )
    | keep(X + "gate.weight")
    | KEPT,
    fields={f: n for f, n in step3p5.fields.items() if f != "norm_topk_prob"},
    source="stepfun-ai/Step-3.7-Flash",
    verified="experts",  # its shared expert stands beside the block
)
