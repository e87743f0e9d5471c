"""Megatron-Core's torch_dist: the keys of a directory, which are not its parameters' names.

One system in three forms, settled by names: layers stacked, with the layer as first axis; layers with numbers; and
single experts as shards of their own (`singleton_local_shards`).
"""

import re
from collections.abc import Mapping
from typing import Any

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either
from fmoe.systems import megatron as core
from fmoe.systems import megatron_hybrid as own
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import NO_COPY, L, Rules, absent, joined, pairs

M = core.M
X = "mlp.experts.experts."
GATE_UP, DOWN = "mlp.experts.{e}.{g=gate_proj|up_proj}.weight", "mlp.experts.{e}.down_proj.weight"
Names = dict[str, str]


def stacked(rules: Mapping[str, str]) -> Names:
    """The same names without the number of the layer, which is the first axis."""
    return {h: re.sub(r"\[", "[l ", t) for h, t in rules.items()}


def experts(singly: bool, gate_up: str = GATE_UP, down: str = DOWN) -> Names:
    if singly:
        names = gate_up.replace("{g=", "{p=")
        return {
            f"{names} [i d]": X + "{e}.linear_fc1.weight_{p=w|v} [i d]",
            f"{down} [d i]": X + "{e}.linear_fc2.weight [d i]",
        }
    return {f"{gate_up} [i d]": X + "linear_fc1.weight [e (g i) d]", f"{down} [d i]": X + "linear_fc2.weight [e d i]"}


OSS = {
    "mlp.experts.gate_up_proj [e d (i g)]": X + "linear_fc1.weight [e (g i) d]",
    "mlp.experts.gate_up_proj_bias [e (i g)]": X + "linear_fc1.bias [e (g i)]",
    "mlp.experts.down_proj [e i d]": X + "linear_fc2.weight [e d i]",
    "mlp.experts.down_proj_bias [e d]": X + "linear_fc2.bias [e d]",
    "mlp.router.weight [u d]": "mlp.router.weight [u d]",
    "mlp.router.bias [u]": "mlp.router.bias [u]",
    "self_attn.sinks [h]": "self_attention.core_attention.softmax_offset [h]",
}


def _either(facts: Facts, options: dict[str, Any]) -> Adapter:
    """What the names say; without any, stacked where all layers are alike, with the chosen spelling of norms."""
    alike = not (facts.dense and facts.sparse) and not (
        facts.family.startswith("qwen3_") and facts.family != "qwen3_moe"
    )
    order = sorted(
        options,
        key=lambda n: (n.startswith("stacked") != alike, n.endswith("local") == core.te(facts), "singleton" in n),
    )
    return either("form", **{n: options[n] for n in order})


def _forms(facts: Facts, layer: "Layer") -> Adapter:
    options: dict[str, Any] = {}
    for spelling in ("te", "local"):
        tail = "" if spelling == "te" else "_local"
        for form in ("stacked", "numbered", "singleton"):
            if form == "stacked" and facts.dense and facts.sparse:
                continue
            options[form + tail] = joined(layer.rules(facts, form, spelling))
    return joined(core.top(facts), [_either(facts, options)]) >> core.padded(facts)


class Layer:
    """The rules of a family's layers in one of the forms: names of all layers, of sparse and of dense ones."""

    def __init__(self, both: Names, sparse: Names, experts: "tuple[str, str] | None", norms: str = "fused"):
        self.both, self.sparse, self.experts, self.norms = both, sparse, experts, norms

    def rules(self, facts: Facts, form: str, spelling: str) -> Rules:
        local = spelling == "local"
        kind = Facts(facts.system, facts.kind, facts.config, {**facts.choices, "specs": spelling})
        mla = self.norms == "mla"
        norm_in = (
            core.mla_norms(kind)
            if mla
            else {"input_layernorm.weight [d]": "self_attention.linear_qkv.layer_norm_weight [d]"}
        )
        both = self.both | norm_in
        sparse = self.sparse | (experts(form == "singleton", *self.experts) if self.experts else {})
        sparse |= core.post_norm(local and not mla)
        dense = core.DENSE | core.post_norm(not (local and mla))
        t, put = (M, dict) if form != "stacked" else ("decoder.layers.", stacked)
        made = pairs(L, t, put(both), l=facts.layers)
        made += pairs(L, t, put(sparse), l=facts.sparse, g=2) + pairs(L, t, put(dense), l=facts.dense)
        if not mla:
            qkv = {
                "self_attn.{p=q|k|v}_proj.weight [(h p c) d]": "self_attention.linear_qkv.weight [(h q|k|v c) d]",
                "self_attn.{p=q|k|v}_proj.bias [(h p c)]": "self_attention.linear_qkv.bias [(h q|k|v c)]",
            }
            sizes = dict(h=facts.groups, q=facts.query, k=1, v=1, c=facts.head_dim)
            return made + pairs(L, t, put(qkv), **sizes, l=facts.layers)
        h, t = f"model.layers.{{l=k+{len(facts.layers)}}}.", "mtp.layers.{k}."
        return made + pairs(h, t + "transformer_layer.", both | sparse) + pairs(h, t, core.MTP)


def qwen3_moe(facts: Facts) -> Adapter:
    return _forms(facts, Layer(core.ATTENTION, core.ROUTER, (GATE_UP, DOWN)))


def mixtral(facts: Facts) -> Adapter:
    return _forms(facts, Layer(core.ATTENTION, core.MIXTRAL, (core.W1 + ".weight", core.W2 + ".weight")))


def gpt_oss(facts: Facts) -> Adapter:
    return _forms(facts, Layer(core.ATTENTION, OSS, None))


def deepseek_v3(facts: Facts) -> Adapter:
    sparse = core.ROUTER | core.BIAS | core.shared("shared_experts")
    copies = dict.fromkeys((L + "embed_tokens.weight", L + "shared_head.head.weight"), NO_COPY)
    made = _forms(facts, Layer(core.MLA, sparse, (GATE_UP, DOWN), "mla"))
    return Adapter((joined([Adapter(made.stages[:1])], absent(copies, facts.lossy)).stages[0], *made.stages[1:]))


def hybrid(facts: Facts) -> Adapter:
    """Qwen3-Next and Qwen3.5: always with numbers."""
    names = own.hybrid(facts, "transformer_layer.")
    kept = [r for r in names if ".mlp.experts." not in str(r)]
    more = [r for h, t in ((L, M), (own.G, "mtp.layers.{l}.transformer_layer.")) for r in pairs(h, t, experts(False))]
    return own.apart(facts) >> joined(kept, more) >> own.SHIFT >> core.padded(facts)


megatron_dist = System(
    name="megatron_dist",
    mark=r"embedding\.word_embeddings\.weight",
    tables=dict(
        qwen3_moe=qwen3_moe,
        mixtral=mixtral,
        deepseek_v3=deepseek_v3,
        gpt_oss=gpt_oss,
        qwen3_next=hybrid,
        qwen3_5_moe=hybrid,
    ),
    choices={"specs": ("te", "local"), "vocab_multiple": ()},
    container="dcp",
    verified="directories that Megatron-Core built and saved on a CPU, local specs (Qwen3, DeepSeek-V3, gpt-oss); "
    "the others and Transformer Engine's names by its source alone; "
    "the container by dist_checkpointing of megatron-core 0.16.1, both ways, one rank",
    source="megatron-core 0.19.2",
)
