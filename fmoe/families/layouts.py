"""The layouts that many families share: experts one by one, or fused in one tensor; in FP8, and with biases.

Each is an adapter of rules and nothing else. hf and native say where the experts lie: a name's part up to `experts.`.
"""

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either, keep, rule, table, together

KEPT = keep("{rest}") | keep("{rest}.weight_scale_inv") | keep("{rest}.expert_bias")
"""Every other tensor, the FP8 scales of those that are quantised, and the router's bias as AFMoE and LFM2 name it."""

MLP = "{pre}layers.{l}.mlp."
EXPERTS = MLP + "experts."


def per_expert(
    hf: str = EXPERTS, native: str | None = None, gate_up: str = "gate_proj|up_proj", down: str = "down_proj"
) -> Adapter:
    """{e}.{gate,up,down}.weight, [out in] each; with FP8 scales and biases where there are some.

    gate_up: the names of gate and up, in this order; one name where the activation is not gated.
    """
    x, n = hf, native or hf
    g, u = ("{g=" + gate_up + "}", "(g i)") if "|" in gate_up else (gate_up, "i")
    return table(
        [
            together(
                rule(x + f"{{e}}.{g}.weight [i d]", n + f"gate_and_up_projs [e d {u}]"),
                rule(x + f"{{e}}.{down}.weight [d i]", n + "down_projs [e i d]"),
            ),
            together(
                rule(x + f"{{e}}.{g}.bias [i]", n + f"gate_up_proj_bias [e {u}]"),
                rule(x + f"{{e}}.{down}.bias [d]", n + "down_proj_bias [e d]"),
            ),
        ]
    )


def fused(hf: str = EXPERTS, native: str | None = None, gated: bool = True) -> Adapter:
    """gate_up_proj [e (g i) d] (or up_proj [e i d]) and down_proj [e d i]: how Transformers v5 holds them in memory."""
    x, n = hf, native or hf
    up = rule(x + "gate_up_proj [e (g i) d]", n + "gate_and_up_projs [e d (g i)]", g=2)
    if not gated:
        up = rule(x + "up_proj [e i d]", n + "gate_and_up_projs [e d i]")
    return together(up, rule(x + "down_proj [e d i]", n + "down_projs [e i d]"))


def experts(hf: str = EXPERTS) -> Adapter:
    """Published one by one; fused is accepted, found and given back too."""
    return either("layout", per_expert=per_expert(hf), fused=fused(hf))
