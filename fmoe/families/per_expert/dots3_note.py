"""Dots 3 Note: experts in the text model, and in the vision tower, there of another number in each layer."""

from dataclasses import replace

from fmoe.families.layouts import KEPT, experts
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.layout.build import either, rule, together

# The vision tower's letters: x experts of width j, for tokens of width c. Its blocks are told apart by text, which
# makes each a tower of its own: x differs from block to block.
BLOCK = "{pre}blocks.{block}.mlp."
X = BLOCK + "experts."

dots3_note = replace(
    deepseek_v3,
    model_types=("dots3_note", "dots3_note_text"),
    rules=experts()
    | either(
        "vision",
        per_expert=together(
            rule(X + "{x}.{g=fc1|fc3}.weight [j c]", X + "gate_and_up_projs [x c (g j)]"),
            rule(X + "{x}.fc2.weight [c j]", X + "down_projs [x j c]"),
            rule(BLOCK + "gate_weight [x c]", BLOCK + "gate.weight [x c]"),
            rule(BLOCK + "router_bias [x]", BLOCK + "gate.e_score_correction_bias [x]"),
        ),
        fused=together(
            rule(X + "gate_up_proj [x (g j) c]", X + "gate_and_up_projs [x c (g j)]", g=2),
            rule(X + "down_proj [x c j]", X + "down_projs [x j c]"),
            rule(BLOCK + "gate.weight [x c]", BLOCK + "gate.weight [x c]"),
            rule(BLOCK + "e_score_correction_bias [x]", BLOCK + "gate.e_score_correction_bias [x]"),
        ),
    )
    | KEPT,
    fields=deepseek_v3.fields | dict(shared_expert_inter_dim="shared_experts_intermediate_size"),
    fp8=None,
    source="dots-studio/dots3-note-prev",
)
