"""Megatron-Core: parameters by name, with Transformer Engine's layers (`specs="te"`) or its own (`specs="local"`).

Per key-value group its query rows, then one key, one value; gate over up in one matrix for each expert.
"""

from fmoe.layout.adapter import Adapter
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import NO_COPY, L, Rules, absent, joined, pairs, tied
from fmoe.systems.wording.stages import Pad

M = "decoder.layers.{l}."
Names = dict[str, str]


def top(facts: Facts) -> Rules:
    names = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
    }
    head = {"lm_head.weight": "output_layer.weight"}
    made = pairs("", "", names if facts.tied else names | head)
    return made + (tied("lm_head.weight", "model.embed_tokens.weight") if facts.tied else [])


def padded(facts: Facts) -> Adapter:
    """Rows of the vocabulary, padded as its tensor-parallel cut asks for."""
    pattern = r"(embedding\.word_embeddings|output_layer)\.weight"
    return Adapter((Pad(pattern, facts.get("vocab_size"), facts.choices["vocab_multiple"] or 1, facts.lossy),))


def te(facts: Facts) -> bool:
    return bool(facts.choices["specs"] == "te")


def qkv(facts: Facts, h: str, t: str) -> Rules:
    sizes = dict(h=facts.groups, q=facts.query, k=1, v=1, c=facts.head_dim)
    return pairs(
        h,
        t,
        {
            "self_attn.{p=q|k|v}_proj.weight [(h p c) d]": "self_attention.linear_qkv.weight [(h q|k|v c) d]",
            "self_attn.{p=q|k|v}_proj.bias [(h p c)]": "self_attention.linear_qkv.bias [(h q|k|v c)]",
        },
        **sizes,
    )


ATTENTION = {
    "self_attn.o_proj.weight [d o]": "self_attention.linear_proj.weight [d o]",
    "self_attn.o_proj.bias [d]": "self_attention.linear_proj.bias [d]",
    "self_attn.{p=q|k}_norm.weight [c]": "self_attention.{p=q|k}_layernorm.weight [c]",
}
MLA = {
    "self_attn.o_proj.weight [d o]": "self_attention.linear_proj.weight [d o]",
    "self_attn.q_proj.weight [o d]": "self_attention.linear_q_proj.weight [o d]",
    "self_attn.q_a_proj.weight [o d]": "self_attention.linear_q_down_proj.weight [o d]",
    "self_attn.q_b_proj.weight [o d]": "self_attention.linear_q_up_proj.weight [o d]",
    "self_attn.kv_a_proj_with_mqa.weight [o d]": "self_attention.linear_kv_down_proj.weight [o d]",
    "self_attn.kv_b_proj.weight [o d]": "self_attention.linear_kv_up_proj.weight [o d]",
}
DENSE = {
    "mlp.{g=gate_proj|up_proj}.weight [i d]": "mlp.linear_fc1.weight [(g i) d]",
    "mlp.down_proj.weight [d i]": "mlp.linear_fc2.weight [d i]",
}
ROUTER = {"mlp.gate.weight [u d]": "mlp.router.weight [u d]"}


def input_norm(facts: Facts, layer: str = "linear_qkv") -> Names:
    name = f"self_attention.{layer}.layer_norm_weight [d]" if te(facts) else "input_layernorm.weight [d]"
    return {"input_layernorm.weight [d]": name}


def post_norm(fused: bool) -> Names:
    name = "mlp.linear_fc1.layer_norm_weight [d]" if fused else "pre_mlp_layernorm.weight [d]"
    return {"post_attention_layernorm.weight [d]": name}


def mla_norms(facts: Facts) -> Names:
    q, kv = (
        ("linear_q_up_proj.layer_norm_weight", "linear_kv_up_proj.layer_norm_weight")
        if te(facts)
        else ("q_layernorm.weight", "kv_layernorm.weight")
    )
    return {
        "input_layernorm.weight [d]": "input_layernorm.weight [d]",
        "self_attn.q_a_layernorm.weight [r]": f"self_attention.{q} [r]",
        "self_attn.kv_a_layernorm.weight [r]": f"self_attention.{kv} [r]",
    }


def shared(name: str) -> Names:
    return {
        f"mlp.{name}.{{g=gate_proj|up_proj}}.weight [i d]": "mlp.shared_experts.linear_fc1.weight [(g i) d]",
        f"mlp.{name}.down_proj.weight [d i]": "mlp.shared_experts.linear_fc2.weight [d i]",
    }


def experts(
    facts: Facts, gate_up: str = "mlp.experts.{e}.{g=gate_proj|up_proj}", down: str = "mlp.experts.{e}.down_proj"
) -> Names:
    fc = "mlp.experts.{fc}.weight{e}" if te(facts) else "mlp.experts.local_experts.{e}.{fc}.weight"
    return {
        f"{gate_up}.weight [i d]": fc.replace("{fc}", "linear_fc1") + " [(g i) d]",
        f"{down}.weight [d i]": fc.replace("{fc}", "linear_fc2") + " [d i]",
    }


def oss_experts(facts: Facts) -> Names:
    name = "mlp.experts.{fc}.{w}{e}" if te(facts) else "mlp.experts.local_experts.{e}.{fc}.{w}"
    say = lambda fc, w: name.replace("{fc}", fc).replace("{w}", w)
    return {
        "mlp.experts.gate_up_proj [e d (i g)]": say("linear_fc1", "weight") + " [(g i) d]",
        "mlp.experts.gate_up_proj_bias [e (i g)]": say("linear_fc1", "bias") + " [(g i)]",
        "mlp.experts.down_proj [e i d]": say("linear_fc2", "weight") + " [d i]",
        "mlp.experts.down_proj_bias [e d]": say("linear_fc2", "bias") + " [d]",
        "mlp.router.weight [u d]": "mlp.router.weight [u d]",
        "mlp.router.bias [u]": "mlp.router.bias [u]",
    }


W1, W2 = "block_sparse_moe.experts.{e}.{g=w1|w3}", "block_sparse_moe.experts.{e}.w2"
MIXTRAL = {"block_sparse_moe.gate.weight [u d]": "mlp.router.weight [u d]"}


def qwen3_moe(facts: Facts) -> Adapter:
    both = ATTENTION | input_norm(facts)
    sparse = ROUTER | experts(facts) | post_norm(False)
    dense = pairs(L, M, DENSE | post_norm(te(facts)), l=facts.dense)
    return joined(
        top(facts), qkv(facts, L, M), pairs(L, M, both), pairs(L, M, sparse, l=facts.sparse), dense
    ) >> padded(facts)


def mixtral(facts: Facts) -> Adapter:
    names = ATTENTION | input_norm(facts) | post_norm(False) | MIXTRAL | experts(facts, W1, W2)
    return joined(top(facts), qkv(facts, L, M), pairs(L, M, names)) >> padded(facts)


def gpt_oss(facts: Facts) -> Adapter:
    names = ATTENTION | input_norm(facts) | post_norm(False) | oss_experts(facts)
    names["self_attn.sinks [h]"] = "self_attention.core_attention.softmax_offset [h]"
    return joined(top(facts), qkv(facts, L, M), pairs(L, M, names, g=2)) >> padded(facts)


BIAS = {"mlp.gate.e_score_correction_bias [u]": "mlp.router.expert_bias [u]"}
MTP = {f"{n}.weight": f"{n}.weight" for n in ("enorm", "hnorm", "eh_proj")} | {
    "shared_head.norm.weight": "final_layernorm.weight"
}


def deepseek_v3(facts: Facts) -> Adapter:
    both = MLA | mla_norms(facts)
    sparse = ROUTER | BIAS | experts(facts) | shared("shared_experts") | post_norm(False)
    h, t = f"model.layers.{{l=k+{len(facts.layers)}}}.", "mtp.layers.{k}."
    return joined(
        top(facts),
        pairs(L, M, both, l=facts.layers),
        pairs(L, M, sparse, l=facts.sparse),
        pairs(L, M, DENSE | post_norm(te(facts)), l=facts.dense),
        pairs(h, t + "mtp_model_layer.", both | sparse),
        pairs(h, t, MTP),
        absent(dict.fromkeys((L + "embed_tokens.weight", L + "shared_head.head.weight"), NO_COPY), facts.lossy),
    ) >> padded(facts)


def hybrid(facts: Facts) -> Adapter:
    """Qwen3-Next and Qwen3.5."""
    from fmoe.systems import megatron_hybrid as own  # which is written in this file's words

    return own.apart(facts) >> joined(own.hybrid(facts)) >> own.SHIFT >> padded(facts)


megatron = System(
    name="megatron",
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
    container="memory",
    verified="Megatron-Bridge's mappings run on its tensors, local specs on models that Megatron-Core built; "
    "Transformer Engine's names by Megatron-Bridge's tables alone; Qwen3-Next all but a norm whose values change; "
    "mp_rank_* of Qwen3-MoE by Megatron-LM's own save_checkpoint, others by hand",
    source="megatron-core 0.19.2, Megatron-LM d98e8a6, Megatron-Bridge 0.6.2 (067f987)",
)
