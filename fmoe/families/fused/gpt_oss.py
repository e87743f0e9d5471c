"""GPT-OSS: fused experts [in, out], gate and up interleaved, with biases, natively the same; in MXFP4 [out, in]."""

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT
from fmoe.layout.build import rule, together

X = "{pre}layers.{l}.mlp.experts."

gpt_oss = Family(
    model_types=("gpt_oss",),
    rules=together(
        rule(X + "gate_up_proj [e d (i g)]", X + "gate_and_up_projs [e d (i g)]", g=2),
        rule(X + "down_proj [e i d]", X + "down_projs [e i d]"),
        rule(X + "gate_up_proj_bias [e (i g)]", X + "gate_up_proj_bias [e (i g)]", g=2),
        rule(X + "down_proj_bias [e d]", X + "down_proj_bias [e d]"),
    )
    | rule("{pre}layers.{l}.mlp.router.{p=weight|bias}", "{pre}layers.{l}.mlp.gate.{p=weight|bias}")
    | KEPT,
    fields=dict(
        n_routed_experts="num_local_experts num_experts",
        n_activated_experts="num_experts_per_tok experts_per_token",
        dim="hidden_size",
        moe_inter_dim="intermediate_size",
        activation_limit="swiglu_limit",
        activation_alpha="swiglu_alpha",
    ),
    fixed=dict(expert_activation="quick_geglu", expert_bias=True, router_bias=True),
    formats={"mxfp4 blocks": r".*\.mlp\.experts\.(gate_up|down)_proj"},
    source="openai/gpt-oss-20b, and the bf16 form that Transformers writes",
    verified="block",
)
