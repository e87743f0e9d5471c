"""torchtitan 0.3.0, and of 0.2 its Qwen3 and DeepSeek-V3: one tensor for an expert matrix of all experts."""

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import alias
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import NO_COPY, L, Rules, absent, joined, pairs, tied
from fmoe.systems.wording.stages import Fill

T = "layers.{l}."
DENSE = {"mlp.{p=gate_proj|up_proj|down_proj}.weight": "feed_forward.{p=w1|w3|w2}.weight"}
SHARED = "{p=gate_proj|up_proj|down_proj}.weight"
MLA = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}


def _top(facts: Facts) -> Rules:
    head = "output.weight" if _old(facts) else "lm_head.weight"
    names = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}
    if facts.tied:
        return [
            *pairs("", "", names),
            *tied("lm_head.weight", "model.embed_tokens.weight"),
            alias(head, of="tok_embeddings.weight").choose(**{head: "present"}).inverse,
        ]
    return pairs("", "", names | {"lm_head.weight": head})


def _old(facts: Facts) -> bool:
    return bool(facts.choices["names"] == "0.2")


NORMS = {"input_layernorm.weight": "attention_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}


def _experts(facts: Facts) -> dict[str, str]:
    names = "experts.{p=w1|w3|w2}" if _old(facts) else "routed_experts.inner_experts.{p=w1_EFD|w3_EFD|w2_EDF}"
    return {
        "mlp.experts.{e}.{p=gate_proj|up_proj|down_proj}.weight [a b]": f"moe.{names} [e a b]",
        "mlp.gate.weight": "moe.router.gate.weight",
    }


def _bias(facts: Facts) -> Adapter:
    """A buffer of every MoE layer that is balanced by it, which Hugging Face has not."""
    name = "expert_bias" if _old(facts) else "expert_bias_E"
    made = rf"\1{name}"
    return Adapter((Fill(r"(layers\.\d+\.moe\.)router\.gate\.weight", made, lossy=facts.lossy),))


def qwen3_moe(facts: Facts) -> Adapter:
    attention = {
        "self_attn.o_proj.weight": "attention.wo.weight",
        "self_attn.{p=q|k}_norm.weight": "attention.{p=q|k}_norm.weight",
    }
    qkv = "attention.{p=wq|wk|wv}.weight" if _old(facts) else "attention.qkv_linear.{p=wq|wk|wv}.weight"
    attention["self_attn.{p=q|k|v}_proj.weight"] = qkv
    table = joined(_top(facts), pairs(L, T, NORMS | _experts(facts) | attention | DENSE))
    return table >> _bias(facts)


def deepseek_v3(facts: Facts) -> Adapter:
    n = len(facts.layers)
    mtp = {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight"}
    made = [*_top(facts), *pairs(L, T, _layer(facts), l=facts.layers)]
    if not _old(facts):
        h, t = f"model.layers.{{l=k+{n}}}.", "mtp_layers.{k}."
        made += pairs(h, t, _layer(facts) | mtp | {"shared_head.norm.weight": "mtp_norm.weight"})
    copies = dict.fromkeys((L + "embed_tokens.weight", L + "shared_head.head.weight"), NO_COPY)
    return joined(made, absent(copies, facts.lossy))


def _layer(facts: Facts) -> dict[str, str]:
    attention = {f"self_attn.{a}.weight": f"attention.{b}.weight" for a, b in MLA.items()}
    other = {
        f"mlp.shared_experts.{SHARED}": "moe.shared_experts.{p=w1|w3|w2}.weight",
        "mlp.gate.e_score_correction_bias": "moe.expert_bias" if _old(facts) else "moe.expert_bias_E",
    }
    return NORMS | _experts(facts) | attention | DENSE | other


def gpt_oss(facts: Facts) -> Adapter:
    attention = {
        "self_attn.{p=q|k|v}_proj.{s=weight|bias}": "attention.qkv_linear.{p=wq|wk|wv}.{s=weight|bias}",
        "self_attn.o_proj.{s=weight|bias}": "attention.wo.{s=weight|bias}",
        "self_attn.sinks": "attention.sinks",
        "mlp.router.{s=weight|bias}": "moe.router.gate.{s=weight|bias}",
        "mlp.experts.gate_up_proj [e d u]": "moe.routed_experts.inner_experts.mlp1_weight_EGD [e u d]",
        "mlp.experts.down_proj [e i d]": "moe.routed_experts.inner_experts.mlp2_weight_EDF [e d i]",
        "mlp.experts.{p=gate_up_proj|down_proj}_bias [e u]": "moe.routed_experts.inner_experts"
        ".{p=mlp1_bias_EG|mlp2_bias_ED} [e u]",
    }
    return joined(_top(facts), pairs(L, T, NORMS | attention)) >> _bias(facts)


def qwen3_5_moe(facts: Facts) -> Adapter:
    full = {
        "self_attn.{p=q|k|v|o}_proj.weight": "attn.{p=wq|wk|wv|wo}.weight",
        "self_attn.{p=q|k}_norm.weight": "attn.{p=q|k}_norm.weight",
    }
    keys = facts["linear_num_key_heads"] * facts["linear_key_head_dim"]
    values = facts["linear_num_value_heads"] * facts["linear_value_head_dim"]
    linear = {
        "linear_attn.in_proj_qkv.weight [(q|k|v) d]": "attn.in_proj_{p=q|k|v}.weight [p d]",
        "linear_attn.conv1d.weight [(q|k|v) 1 c]": "attn.conv_{p=q|k|v}.weight [p 1 c]",
        "linear_attn.in_proj_{p=z|a|b}.weight": "attn.in_proj_{p=z|a|b}.weight",
        "linear_attn.{p=A_log|dt_bias}": "attn.{p=A_log|dt_bias}",
        "linear_attn.{p=norm|out_proj}.weight": "attn.{p=norm|out_proj}.weight",
    }
    other = {
        f"mlp.shared_expert.{SHARED}": "moe.shared_experts.{p=w1|w3|w2}.weight",
        "mlp.shared_expert_gate.weight": "moe.shared_experts.gate.weight",
    }
    table = joined(
        _top(facts),
        pairs(L, T, NORMS | _experts(facts) | full | other),
        pairs(L, T, linear, q=keys, k=keys, v=values),
        absent({"mtp.{rest}": "torchtitan's Qwen3.5 has no MTP layer"}, facts.lossy),
        absent({"model.visual.{rest}": "torchtitan's Qwen3.5 tower has other names"}, facts.lossy),
    )
    return table >> _bias(facts)


torchtitan = System(
    name="torchtitan",
    mark=r"tok_embeddings\.weight",
    tables=dict(qwen3_moe=qwen3_moe, deepseek_v3=deepseek_v3, gpt_oss=gpt_oss, qwen3_5_moe=qwen3_5_moe),
    choices={"names": ("0.3", "0.2")},
    container="dcp",
    verified="its models, adapters and checkpointer, run beside ours (Qwen3, DeepSeek-V3, 0.3.0); "
    "its models' names and shapes (gpt-oss, Qwen3.5)",
    source="torchtitan 0.3.0 and b5bcd76; names='0.2': the maps of 0.2.1's adapters, Qwen3 and DeepSeek-V3",
)
