"""Mixtral: w1 is gate, w3 is up, w2 is down, under `block_sparse_moe`; natively, and fused, under `mlp`."""

from fmoe.families.kind import Family
from fmoe.families.layouts import FIELDS, KEPT, LAYER, renamed
from fmoe.families.sparse import EVERY

DISK = LAYER + "block_sparse_moe."
WORDS = dict(gate_up="w1|w3", down="w2")

mixtral = Family(
    model_types=("mixtral", "minimax"),
    rules=renamed({"gate.{rest}": "gate.{rest}"}, None, DISK, **WORDS) | KEPT,
    fields=FIELDS | dict(input_jitter="router_jitter_noise"),
    fixed=dict(softmax_before_topk=True, norm_topk_prob=True, router_weights_fp32=True),
    sparse=EVERY,
    source="mistralai/Mixtral-8x7B-v0.1, MiniMaxAI/MiniMax-Text-01-hf",
    verified="block",
)
