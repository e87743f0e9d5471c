"""GGUF, as llama.cpp names and lays its tensors; shapes row-major (a file's `ne` is the reverse)."""

from fmoe.layout.adapter import Adapter
from fmoe.systems.engines import beyond
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.nibbles import Nibbles
from fmoe.systems.wording.say import L, Rules, absent, joined, pairs, rest, tied
from fmoe.systems.wording.stages import Value

B = "blk.{l}."
Names = dict[str, str]
EXPERT = "{p=gate_proj|up_proj|down_proj}"
ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.{p=q|k|v|o}_proj.{s=weight|bias}": "attn_{p=q|k|v|output}.{s=weight|bias}",
    "self_attn.{p=q|k}_norm.weight": "attn_{p=q|k}_norm.weight",
}
MOE = {
    f"mlp.experts.{{e}}.{EXPERT}.weight [a b]": "ffn_{p=gate|up|down}_exps.weight [e a b]",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
DENSE = {f"mlp.{EXPERT}.weight": "ffn_{p=gate|up|down}.weight"}


def _top(facts: Facts) -> Rules:
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if facts.tied:
        return pairs("", "", names) + tied("lm_head.weight", "model.embed_tokens.weight")
    return pairs("", "", names | {"lm_head.weight": "output.weight"})


def _after(name: str) -> Names:
    return {"post_attention_layernorm.weight": f"{name}.weight"}


def qwen3_moe(facts: Facts) -> Adapter:
    return joined(_top(facts), pairs(L, B, ATTENTION | MOE | DENSE | _after("ffn_norm")))


def mixtral(facts: Facts) -> Adapter:
    """Architecture `llama`: rows of q and k as pairs that rotate together."""
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "self_attn.{p=v|o}_proj.weight": "attn_{p=v|output}.weight",
        "block_sparse_moe.experts.{e}.{p=w1|w3|w2}.weight [a b]": "ffn_{p=gate|up|down}_exps.weight [e a b]",
        "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    }
    turn = lambda p, heads: pairs(
        L, B, {f"self_attn.{p}_proj.weight [(h t c) d]": f"attn_{p}.weight [(h c t) d]"}, t=2, h=heads
    )
    return joined(_top(facts), pairs(L, B, names | _after("ffn_norm")), turn("q", facts.heads), turn("k", facts.groups))


def deepseek_v3(facts: Facts) -> Adapter:
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "self_attn.{p=q|q_a|q_b|o}_proj.weight": "attn_{p=q|q_a|q_b|output}.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
        "self_attn.{p=q|kv}_a_layernorm.weight": "attn_{p=q|kv}_a_norm.weight",
        "self_attn.part_k [h k r]": "attn_k_b.weight [h r k]",
        "self_attn.part_v [h v r]": "attn_v_b.weight [h v r]",
        f"mlp.shared_experts.{EXPERT}.weight": "ffn_{p=gate|up|down}_shexp.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    }
    gone = beyond(facts, "llama.cpp's converter leaves the MTP layer out")
    table = joined(_top(facts), pairs(L, B, names | MOE | DENSE | _after("ffn_norm"), l=facts.layers), gone)
    return kv_apart(facts) >> table


def kv_apart(facts: Facts) -> Adapter:
    sizes = dict(h=facts.heads, k=facts["qk_nope_head_dim"], v=facts["v_head_dim"])
    name = {"self_attn.kv_b_proj.weight [(h k|v) r]": "self_attn.part_{p=k|v} [h p r]"}
    return joined(pairs(L, L, name, **sizes, l=facts.layers), [rest()])


def gpt_oss(facts: Facts) -> Adapter:
    names = {
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router.{s=weight|bias}": "ffn_gate_inp.{s=weight|bias}",
        "mlp.experts.gate_up_proj_bias [e (i g)]": "ffn_{g=gate|up}_exps.bias [e i]",
        "mlp.experts.down_proj_bias [e d]": "ffn_down_exps.bias [e d]",
    }
    if facts.keep:
        names |= {
            "mlp.experts.gate_up_proj_packed [e (i g) b]": "ffn_{g=gate|up}_exps.weight [e i b]",
            "mlp.experts.down_proj_packed [e d b]": "ffn_down_exps.weight [e d b]",
        }
    else:
        names |= {
            "mlp.experts.gate_up_proj [e d (i g)]": "ffn_{g=gate|up}_exps.weight [e i d]",
            "mlp.experts.down_proj [e i d]": "ffn_down_exps.weight [e d i]",
        }
    table = joined(_top(facts), pairs(L, B, ATTENTION | names | _after("post_attention_norm")))
    return Adapter((Nibbles(r"(.*\.mlp\.experts\.(?:gate_up|down)_proj)"),)) >> table if facts.keep else table


# Qwen3-Next and Qwen3.5

LINEAR = {
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.part_z [z d]": "attn_gate.weight [z d]",
    "linear_attn.conv1d.weight [c 1 k]": "ssm_conv1d.weight [c k]",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "linear_attn.A_log": "ssm_a",
}
SHARED = {
    f"mlp.shared_expert.{EXPERT}.weight": "ffn_{p=gate|up|down}_shexp.weight",
    "mlp.shared_expert_gate.weight [1 d]": "ffn_gate_inp_shexp.weight [d]",
}
NEXTN = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}
VALUES = (
    Value(r"blk\.\d+\.ssm_a", "-exp"),
    Value(
        r"output_norm\.weight|blk\.\d+\.(attn_norm|post_attention_norm|attn_[qk]_norm|nextn\.\w*norm)\.weight",
        "shift",
        1.0,
    ),
)


def linear_sizes(facts: Facts) -> dict[str, int]:
    g, m = facts["linear_num_key_heads"], facts["linear_num_value_heads"] // facts["linear_num_key_heads"]
    return dict(g=g, m=m, k=facts["linear_key_head_dim"], v=facts["linear_value_head_dim"])


def _hybrid(facts: Facts, linear: Names) -> Adapter:
    names = ATTENTION | MOE | DENSE | SHARED | _after("post_attention_norm")
    n = len(facts.layers)
    s = linear_sizes(facts)
    key, value = s["g"] * s["k"], s["g"] * s["m"] * s["v"]
    qkv = {"linear_attn.part_{p=q|k|v} [p d]": "attn_qkv.weight [(q|k|v) d]"}
    mtp = {f"mtp.{a}.weight": f"blk.{n}.nextn.{b}.weight" for a, b in NEXTN.items()}
    table = joined(
        _top(facts),
        pairs(L, B, names | linear, l=facts.layers),
        pairs(L, B, qkv, q=key, k=key, v=value, l=facts.layers),
        pairs("mtp.layers.{k}.", f"blk.{{l=k+{n}}}.", names),
        pairs("", "", mtp),
        absent({"model.visual.{rest}": "a GGUF file of the text model has no tower"}, facts.lossy),
    )
    return table >> Adapter(VALUES)


def qwen3_next(facts: Facts) -> Adapter:
    s = linear_sizes(facts)
    sizes = dict(g=s["g"], q=s["k"], k=s["k"], v=s["m"] * s["v"], z=s["m"] * s["v"])
    name = {"linear_attn.in_proj_qkvz.weight [(g q|k|v|z) d]": "linear_attn.part_{p=q|k|v|z} [(g p) d]"}
    return joined(pairs(L, L, name, **sizes), [rest()]) >> _hybrid(facts, LINEAR)


def qwen3_5_moe(facts: Facts) -> Adapter:
    """Value heads, which the file groups by their place within a key head."""
    s = linear_sizes(facts)
    key, value = s["g"] * s["k"], s["g"] * s["m"] * s["v"]
    X = "linear_attn."
    cut = {
        X + "in_proj_qkv.weight [(q|k|v) d]": X + "cut_{p=q|k|v} [p d]",
        X + "conv1d.weight [(q|k|v) 1 c]": X + "conv_{p=q|k|v} [p c]",
    }
    turned = {
        X + "cut_{p=q|k}": X + "part_{p=q|k}",
        X + "cut_v [(g m v) d]": X + "part_v [(m g v) d]",
        X + "conv_{p=q|k}": X + "turned_{p=q|k}",
        X + "conv_v [(g m v) c]": X + "turned_v [(m g v) c]",
    }
    linear = {n: t for n, t in LINEAR.items() if n.startswith(X + "norm")} | {
        X + "in_proj_z.weight [(g m v) d]": "attn_gate.weight [(m g v) d]",
        X + "in_proj_a.weight [(g m) d]": "ssm_alpha.weight [(m g) d]",
        X + "in_proj_b.weight [(g m) d]": "ssm_beta.weight [(m g) d]",
        X + "dt_bias [(g m)]": "ssm_dt.bias [(m g)]",
        X + "A_log [(g m)]": "ssm_a [(m g)]",
        X + "out_proj.weight [d (g m v)]": "ssm_out.weight [d (m g v)]",
    }
    conv = {X + "turned_{p=q|k|v} [p c]": "ssm_conv1d.weight [(q|k|v) c]"}
    sizes = dict(q=key, k=key, v=value)
    last = _hybrid(facts, {})
    turn = dict(g=s["g"], m=s["m"])
    table = joined([Adapter(last.stages[:1])], pairs(L, B, linear, **turn), pairs(L, B, conv, **sizes))
    return (
        joined(pairs(L, L, cut, **sizes), [rest()])
        >> joined(pairs(L, L, turned, **turn), [rest()])
        >> table
        >> Adapter(last.stages[1:])
    )


gguf = System(
    name="gguf",
    mark=r"token_embd\.weight",
    tables=dict(
        qwen3_moe=qwen3_moe,
        mixtral=mixtral,
        deepseek_v3=deepseek_v3,
        gpt_oss=gpt_oss,
        qwen3_next=qwen3_next,
        qwen3_5_moe=qwen3_5_moe,
    ),
    container="gguf",
    kept=("gpt_oss",),
    verified="files that llama.cpp's converter wrote; norms, ssm_a: values to within their bounds; "
    "the container by the gguf package, both ways",
    source="llama.cpp of llama-cpp-python 0.3.36, gguf 0.19.0",
)
