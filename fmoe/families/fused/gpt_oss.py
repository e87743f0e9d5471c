"""GPT-OSS: fused experts [in, out], gate and up interleaved, with biases, natively the same; in MXFP4 [out, in]."""

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT, MLP, transposed
from fmoe.families.router import AFTER
from fmoe.families.sparse import EVERY
from fmoe.layout.build import rule

gpt_oss = Family(
    model_types=("gpt_oss",),
    rules=transposed(gate_up="(i g)", biases=True)
    | rule(MLP + "router.{p=weight|bias}", MLP + "gate.{p=weight|bias}")
    | KEPT,
    fields=dict(
        n_routed_experts="num_local_experts num_experts",
        n_activated_experts="num_experts_per_tok experts_per_token",
        dim="hidden_size",
        moe_inter_dim="intermediate_size",
        activation_limit="swiglu_limit",
        activation_alpha="swiglu_alpha",
    ),
    fixed=dict(expert_activation="quick_geglu", expert_bias=True, router_bias=True) | AFTER,
    formats={"mxfp4 blocks": r".*\.mlp\.experts\.(gate_up|down)_proj"},
    sparse=EVERY,
    source="openai/gpt-oss-20b, and the bf16 form that Transformers writes",
    verified="block",
)
