"""HunyuanImage-3: gate and up of an expert in one matrix, up first: one table names the halves, one stacks them."""

from dataclasses import replace

from fmoe.families.layouts import KEPT, MLP, per_expert
from fmoe.families.renamed.hunyuan import hunyuan_v1_moe
from fmoe.layout.build import rule

HALVES = "{g=up_proj|gate_proj}.weight"
X, SHARED = MLP + "experts.{e}.", MLP + "shared_mlp."

hunyuan_image_3_moe = replace(
    hunyuan_v1_moe,
    model_types=("hunyuan_image_3_moe",),
    rules=(
        rule(X + "gate_and_up_proj.weight [(g i) d]", X + HALVES + " [i d]")
        | rule(X + "down_proj.weight", X + "down_proj.weight")
        | rule(SHARED + "gate_and_up_proj.weight [(g s) d]", SHARED + HALVES + " [s d]")
        | rule(SHARED + "down_proj.weight", SHARED + "down_proj.weight")
        | KEPT
    )
    >> (
        per_expert()
        | rule(MLP + "gate.wg.weight", MLP + "gate.weight")
        | rule(SHARED + "{rest}", MLP + "shared_experts.{rest}")
        | KEPT
    ),
    unsaid=dict(mlp_bias="adds biases to experts, whose names are not known"),
    source="tencent/HunyuanImage-3.0, as Automodel 0.7.0 reads it",
    verified="keys",
)
