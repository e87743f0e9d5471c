"""Switch Transformers and NLLB-MoE: experts called `expert_{e}`, in encoder and decoder, not gated."""

from fmoe.families.kind import Family
from fmoe.families.layouts import KEPT
from fmoe.layout.adapter import Adapter
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


def _nllb(stack: str, i: str) -> Adapter:
    """The rules of the encoder's or the decoder's experts, whose width is i: one's may be another than the other's."""
    x, n = ("{pre}" + stack + ".layers.{l}.ffn." + side.removeprefix("{pre}") for side in (X, N))
    return together(
        rule(f"{x}fc1.weight [{i} d]", f"{n}gate_and_up_projs [e d {i}]"),
        rule(f"{x}fc2.weight [d {i}]", f"{n}down_projs [e {i} d]"),
        rule(f"{x}fc1.bias [{i}]", f"{n}gate_up_proj_bias [e {i}]"),
        rule(f"{x}fc2.bias [d]", f"{n}down_proj_bias [e d]"),
    )


nllb_moe = Family(
    model_types=("nllb-moe",),
    rules=_nllb("encoder", "i") | _nllb("decoder", "v") | KEPT,
    fields=dict(
        n_routed_experts="num_experts",
        n_activated_experts="num_selected_experts",
        dim="d_model",
        moe_inter_dim="encoder_ffn_dim",
    ),
    fixed=dict(n_activated_experts=2, expert_bias=True),
    sizes=dict(v="decoder_ffn_dim"),
    activations=RELU_IS_NONE_OF_OURS,
    activation_field="activation_function",
    sparse="",
    source="facebook/nllb-moe-54b",
    verified="round trip",
)
