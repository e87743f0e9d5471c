"""Megatron-Core's Qwen3-Next and Qwen3.5: gated queries, and linear attention in most layers.

Both are taken apart in a stage of their own: rows come head by head, and go part by part.
"""

from fmoe.layout.adapter import Adapter
from fmoe.systems.megatron import (
    ATTENTION,
    DENSE,
    ROUTER,
    M,
    experts,
    input_norm,
    post_norm,
    shared,
    te,
    top,
)
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, Rules, absent, joined, pairs, rest
from fmoe.systems.wording.stages import Value

G = "mtp.layers.{l}."
SHARED_GATE = {"mlp.shared_expert_gate.weight [1 d]": "mlp.shared_experts.gate_weight [1 d]"}
QWEN_MTP = {
    "mtp.fc.weight": "mtp.layers.0.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "mtp.layers.0.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "mtp.layers.0.hnorm.weight",
    "mtp.norm.weight": "mtp.layers.0.final_layernorm.weight",
}
APART = {
    "self_attn.q_proj.weight [(h n g c) d]": "self_attn.part_{g=q|z} [h n c d]",
    "self_attn.k_proj.weight [(h c) d]": "self_attn.part_k [h 1 c d]",
    "self_attn.v_proj.weight [(h c) d]": "self_attn.part_v [h 1 c d]",
}
GATED = {"self_attn.part_{p=q|z|k|v} [h p c d]": "self_attention.linear_qkv.weight [(h q|z|k|v c) d]"}
LINEAR = {f"linear_attn.{n}": f"self_attention.{n}" for n in ("conv1d.weight", "A_log", "dt_bias", "out_proj.weight")}
LINEAR |= {"linear_attn.norm.weight": "self_attention.out_norm.weight"}


def linear_sizes(facts: Facts) -> dict[str, int]:
    """Rows of each part for a key head."""
    m = facts["linear_num_value_heads"] // facts["linear_num_key_heads"]
    k, v = facts["linear_key_head_dim"], facts["linear_value_head_dim"]
    return dict(q=k, k=k, v=m * v, z=m * v, b=m, a=m)


def apart(facts: Facts) -> Adapter:
    """q, its gate, k and v of each group; of Qwen3-Next q, k, v, z, b and a of each key head."""
    full = [r for h in (L, G) for r in pairs(h, h, APART, h=facts.groups, n=facts.query, c=facts.head_dim)]
    linear: Rules = []
    if facts.family == "qwen3_next":
        sizes = linear_sizes(facts) | {"g": facts["linear_num_key_heads"]}
        linear = pairs(
            L,
            L,
            {
                "linear_attn.in_proj_qkvz.weight [(g q|k|v|z) d]": "linear_attn.part_{p=q|k|v|z} [(g p) d]",
                "linear_attn.in_proj_ba.weight [(g b|a) d]": "linear_attn.part_{p=b|a} [(g p) d]",
            },
            **sizes,
        )
    return joined(full, linear, [rest()])


def in_proj(facts: Facts) -> Rules:
    sizes = {n: size * facts["linear_num_key_heads"] for n, size in linear_sizes(facts).items()}
    if facts.family == "qwen3_next":
        here, parts = "part_{p=q|k|v|z|b|a} [p d]", "q|k|v|z|b|a"
    else:
        here, parts = "in_proj_{p=qkv|z|b|a}.weight [p d]", "qkv|z|b|a"
        sizes |= {"qkv": sizes["q"] + sizes["k"] + sizes["v"]}
    sizes = {n: sizes[n] for n in parts.split("|")}
    return pairs(L + "linear_attn.", M + "self_attention.", {here: f"in_proj.weight [({parts}) d]"}, **sizes)


def hybrid(facts: Facts, mtp: str = "mtp_model_layer.") -> Rules:
    names = ATTENTION | ROUTER | experts(facts) | shared("shared_expert") | SHARED_GATE
    gated = dict(h=facts.groups, q=facts.query, z=facts.query, k=1, v=1, c=facts.head_dim)
    inner = "mtp.layers.{l}." + mtp
    return [
        *top(facts),
        *pairs(L, M, {n: t for n, t in names.items() if "experts" not in t and "router" not in t}),
        *pairs(
            L, M, {n: t for n, t in names.items() if "experts" in t or "router" in t} | post_norm(False), l=facts.sparse
        ),
        *pairs(L, M, DENSE | post_norm(te(facts)), l=facts.dense),
        *pairs(L, M, input_norm(facts), l=facts.full),
        *pairs(L, M, input_norm(facts, "in_proj"), l=facts.linear),
        *pairs(L, M, GATED, **gated),
        *pairs(L, M, LINEAR),
        *in_proj(facts),
        *pairs(G, inner, names | GATED | input_norm(facts) | post_norm(False), **gated),
        *pairs("", "", QWEN_MTP),
        *absent({"model.visual.{rest}": "Megatron-Core's tower has other names"}, facts.lossy),
    ]


SHIFT = Adapter((Value(r"(decoder|mtp)\..*self_attention\.out_norm\.weight", "shift", -1.0),))
