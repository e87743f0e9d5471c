"""ERNIE-4.5-VL: the experts for text, then those for images, in one index space; natively a block for each.

A layer adds `fmoe.moe` of `text_moe` on text (`mask=`), that of `vision_moe` on images, and the shared experts.
"""

from dataclasses import replace

from fmoe.families.layouts import KEPT, MLP
from fmoe.families.renamed.under_mlp import ernie4_5_moe
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either, rule, together

DENSE = "{p=gate_proj|up_proj|down_proj}.{rest}"
BIAS = "moe_statics.e_score_correction_bias"


def block(tower: str, e: str, i: str, gate: str) -> Adapter:
    """One tower's router, stored [d e], and experts: `e` numbers them, `i` is the letter of their width."""
    x, n = MLP + f"experts.{e}.", MLP + f"{tower}."
    return together(
        rule(x + f"{{g=gate_proj|up_proj}}.weight [{i} d]", n + f"experts.gate_and_up_projs [e d (g {i})]"),
        rule(x + f"down_proj.weight [d {i}]", n + f"experts.down_projs [e {i} d]"),
    ) | rule(MLP + f"gate.{gate} [d e]", n + "gate.weight [e d]")


def in_memory(tower: str, i: str) -> Adapter:
    n = MLP + f"{tower}."
    return (
        together(
            rule(n + f"experts.gate_up_proj [e (g {i}) d]", n + f"experts.gate_and_up_projs [e d (g {i})]", g=2),
            rule(n + f"experts.down_proj [e d {i}]", n + f"experts.down_projs [e {i} d]"),
        )
        | rule(n + "gate.weight", n + "gate.weight")
        | rule(n + f"gate.{BIAS} [1 e]", n + "gate.e_score_correction_bias [e]")
    )


ernie4_5_vl_moe = replace(
    ernie4_5_moe,
    model_types=("ernie4_5_vl_moe",),
    rules=either(
        "layout",
        per_expert=block("text_moe", "{e}", "i", "weight")
        | block("vision_moe", "{k=e+E}", "v", "weight_1")
        | rule(MLP + BIAS + " [m e]", MLP + "{m=text_moe|vision_moe}.gate.e_score_correction_bias [e]"),
        fused=in_memory("text_moe", "i") | in_memory("vision_moe", "v"),
    )
    | rule(MLP + "shared_experts.{rest}", MLP + "shared_experts.{rest}")
    | rule(MLP + DENSE, MLP + DENSE)
    | KEPT,
    fields=ernie4_5_moe.fields | dict(moe_inter_dim="moe_intermediate_size.0"),
    sizes=dict(v="moe_intermediate_size.1"),
    source="baidu/ERNIE-4.5-VL-28B-A3B-PT",
)
