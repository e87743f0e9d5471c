"""DeepSeek-V4.1: as V4 on disk, natively `ffn` too; the draft (`mtp`) has experts of a number of their own."""

from dataclasses import replace

from fmoe.families.layouts import KEPT, LAYER, block
from fmoe.families.renamed.deepseek_v4 import MTP, NAMES, deepseek_v4
from fmoe.families.renamed.mixtral import WORDS
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import rule, together

FFN = NAMES | {"gate.bias_vl": "gate.bias_vl"}  # the second: the router's correction for tokens of images
X = MTP + "ffn.experts."


def _beside(layer: str) -> Adapter:
    """What stands beside the experts under a name of its own."""
    return rule(layer + "hc_{m=attn|ffn}_{p=fn|base|scale}", layer + "{m=attn|ffn}_hc.{p=fn|base|scale}") | rule(
        layer + "attn.attn_sink", layer + "attn.sinks_param.weight"
    )


def _draft() -> Adapter:
    """The draft's experts: x of them, of the decoder's width."""
    experts = together(
        rule(X + "{x}.{g=w1|w3}.weight [i d]", X + "gate_and_up_projs [x d (g i)]"),
        rule(X + "{x}.w2.weight [d i]", X + "down_projs [x i d]"),
    )
    for theirs, ours in FFN.items():
        experts = experts | rule(MTP + "ffn." + theirs, MTP + "ffn." + ours)
    return experts


deepseek_v41 = replace(
    deepseek_v4,
    model_types=("deepseek_v41", "deepseek_v41_text"),
    rules=block(LAYER + "ffn.", LAYER + "ffn.", FFN, **WORDS) | _draft() | _beside(LAYER) | _beside(MTP) | KEPT,
    sizes=dict(x="dspark_n_routed_experts n_routed_experts"),
    source="DeepSeek-V4.1-Flash, as Automodel 0.7.0 reads it",
    verified="keys",
)
