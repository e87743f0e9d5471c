"""Mixtral: w1 is gate, w3 is up, w2 is down, under `block_sparse_moe`; natively, and fused, under `mlp`."""

from fmoe.families.kind import Family
from fmoe.families.layouts import EXPERTS, KEPT, fused, per_expert
from fmoe.layout.build import either, rule

DISK = "{pre}layers.{l}.block_sparse_moe."
GATE = "{pre}layers.{l}.mlp.gate.{rest}"

mixtral = Family(
    model_types=("mixtral", "minimax"),
    rules=either(
        "layout",
        per_expert=per_expert(DISK + "experts.", EXPERTS, "w1|w3", "w2") | rule(DISK + "gate.{rest}", GATE),
        fused=fused() | rule(GATE, GATE),
    )
    | KEPT,
    fields=dict(
        n_routed_experts="num_local_experts num_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="intermediate_size",
    ),
    fixed=dict(softmax_before_topk=True, norm_topk_prob=True, router_weights_fp32=True),
    source="mistralai/Mixtral-8x7B-v0.1, MiniMaxAI/MiniMax-Text-01-hf",
    verified="block",
)
