"""Hugging Face's side, said once for a family: whatever layout its files have, tables of systems see the names below.

Experts one by one as published, under `model.layers.{l}.`; of gpt-oss fused, as published. What no rule here names
passes, for the table of the system to claim.
"""

from typing import Any

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either, rule
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, joined, pairs, rest

TEXT = "{p=layers|embed_tokens|norm}.{rest}"


def published(facts: Facts) -> Adapter:
    """Any of the family's Hugging Face layouts <-> the one that tables of systems are written for."""
    name = facts.family
    if name == "gpt_oss":
        return Adapter()
    if name == "mixtral":
        return _mixtral()
    inside = _layout("layout", L + "mlp.experts.") if name != "qwen3_5_moe" else _qwen3_5(facts)
    return inside


def _layout(choice: str, experts: str, *, fused_first: bool = False) -> Adapter:
    one = rule(
        experts + "{e}.{p=gate_proj|up_proj|down_proj}.weight", experts + "{e}.{p=gate_proj|up_proj|down_proj}.weight"
    )
    fused = joined(
        [
            rule(experts + "gate_up_proj [e (g i) d]", experts + "{e}.{g=gate_proj|up_proj}.weight [i d]"),
            rule(experts + "down_proj [e d i]", experts + "{e}.down_proj.weight [d i]"),
        ]
    )
    options: dict[str, Any] = (
        {"fused": fused, "per_expert": one} if fused_first else {"per_expert": one, "fused": fused}
    )
    return joined([either(choice, **options), rest()])


def _mixtral() -> Adapter:
    there, here = L + "block_sparse_moe.", L + "mlp."
    one = pairs(there, there, {n: n for n in ("experts.{e}.{p=w1|w2|w3}.weight", "gate.weight")})
    fused = [
        rule(here + "experts.gate_up_proj [e (g i) d]", there + "experts.{e}.{g=w1|w3}.weight [i d]"),
        rule(here + "experts.down_proj [e d i]", there + "experts.{e}.w2.weight [d i]"),
        rule(here + "gate.weight", there + "gate.weight"),
    ]
    return joined([either("layout", per_expert=joined(one), fused=joined(fused)), rest()])


def _qwen3_5(facts: Facts) -> Adapter:
    """The text model of the multimodal one, or alone; decoder and MTP fused or one by one."""
    inside = rule("model.language_model." + TEXT, "model." + TEXT)
    alone = rule("model." + TEXT, "model." + TEXT)
    whole = "text_config" in facts.config or facts.config.get("model_type") == "qwen3_5_moe"
    options: dict[str, Any] = {"inside": inside, "alone": alone} if whole else {"alone": alone, "inside": inside}
    prefix = joined([either("text", **options), rest()])
    decoder = _layout("layout", L + "mlp.experts.", fused_first=True)
    mtp = _layout("mtp_layout", "mtp.layers.{l}.mlp.experts.", fused_first=True)
    return prefix >> (decoder | mtp)
