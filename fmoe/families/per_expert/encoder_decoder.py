"""Switch Transformers and NLLB-MoE: experts called `expert_{e}`, in encoder and decoder, not gated."""

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT
from fmoe.layout.build import rule, together

X, N = "{pre}experts.expert_{e}.", "{pre}experts."
RELU_IS_NONE_OF_OURS = {"relu2": "relu2"}

switch_transformers = Family(
    model_types=("switch_transformers",),
    rules=together(
        rule(X + "wi.weight [i d]", N + "gate_and_up_projs [e d i]"),
        rule(X + "wo.weight [d i]", N + "down_projs [e i d]"),
    )
    | KEPT,
    fields=dict(
        n_routed_experts="num_experts", n_activated_experts="num_selected_experts", dim="d_model", moe_inter_dim="d_ff"
    ),
    fixed=dict(n_activated_experts=1),
    activations=RELU_IS_NONE_OF_OURS,
    activation_field="dense_act_fn",
    sparse="",
    source="google/switch-base-8",
    verified="round trip",
)

nllb_moe = Family(
    model_types=("nllb-moe",),
    rules=together(
        rule(X + "fc1.weight [i d]", N + "gate_and_up_projs [e d i]"),
        rule(X + "fc2.weight [d i]", N + "down_projs [e i d]"),
        rule(X + "fc1.bias [i]", N + "gate_up_proj_bias [e i]"),
        rule(X + "fc2.bias [d]", N + "down_proj_bias [e d]"),
    )
    | KEPT,
    fields=dict(
        n_routed_experts="num_experts",
        n_activated_experts="num_selected_experts",
        dim="d_model",
        moe_inter_dim="encoder_ffn_dim",
    ),
    fixed=dict(n_activated_experts=2, expert_bias=True),
    activations=RELU_IS_NONE_OF_OURS,
    activation_field="activation_function",
    sparse="",
    source="facebook/nllb-moe-54b",
    verified="round trip",
)
