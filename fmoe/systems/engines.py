"""vLLM and SGLang: a model's tensors in memory, on one rank, before a kernel's own padding, swapping or shuffling.

Hugging Face's names, with q, k, v joined by plain concatenation, gate over up, and the experts in two tensors.
"""

from collections.abc import Callable

from fmoe.layout.adapter import Adapter
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, Rules, absent, joined, pairs, tied

Names = dict[str, str]
SGLANG = r".*\.fused_qkv_a_proj_with_mqa\.weight"
"""A name that tells DeepSeek-V3 in SGLang from the same in vLLM; other families have the same names in both."""
APART = "{} loads the MTP layer as a model of its own"


def _top(facts: Facts) -> Rules:
    names = {n: n for n in ("model.embed_tokens.weight", "model.norm.weight")}
    if facts.tied:
        return pairs("", "", names) + tied("lm_head.weight", "model.embed_tokens.weight")
    return pairs("", "", names | {"lm_head.weight": "lm_head.weight"})


def _same(*names: str) -> Names:
    return {n: n for n in names}


NORMS = _same("input_layernorm.weight", "post_attention_layernorm.weight")
ATTENTION = _same("self_attn.o_proj.{s=weight|bias}", "self_attn.{p=q|k}_norm.weight")


def _qkv(rows: int, facts: Facts) -> Rules:
    sizes = dict(
        q=rows * facts.heads * facts.head_dim, k=facts.groups * facts.head_dim, v=facts.groups * facts.head_dim
    )
    return pairs(
        L,
        L,
        {
            "self_attn.{p=q|k|v}_proj.weight [p d]": "self_attn.qkv_proj.weight [(q|k|v) d]",
            "self_attn.{p=q|k|v}_proj.bias [p]": "self_attn.qkv_proj.bias [(q|k|v)]",
        },
        **sizes,
    )


def _mlp(at: str) -> Names:
    return {f"{at}.{{g=gate_proj|up_proj}}.weight [i d]": f"{at}.gate_up_proj.weight [(g i) d]"} | _same(
        f"{at}.down_proj.weight"
    )


def _experts(at: str = "mlp", gate_up: str = "{g=gate_proj|up_proj}", down: str = "down_proj") -> Names:
    return {
        f"{at}.experts.{{e}}.{gate_up}.weight [i d]": f"{at}.experts.w13_weight [e (g i) d]",
        f"{at}.experts.{{e}}.{down}.weight [d i]": f"{at}.experts.w2_weight [e d i]",
    } | _same(f"{at}.gate.weight")


def qwen3_moe(facts: Facts) -> Adapter:
    return joined(_top(facts), _qkv(1, facts), pairs(L, L, NORMS | ATTENTION | _mlp("mlp") | _experts()))


def mixtral(facts: Facts) -> Adapter:
    names = NORMS | ATTENTION | _experts("block_sparse_moe", "{g=w1|w3}", "w2")
    return joined(_top(facts), _qkv(1, facts), pairs(L, L, names))


def deepseek(fused: str) -> Callable[[Facts], Adapter]:
    """fused: what the engine calls q_a and kv_a, joined."""

    def deepseek_v3(facts: Facts) -> Adapter:
        at = "self_attn."
        names = (
            NORMS
            | _mlp("mlp")
            | _mlp("mlp.shared_experts")
            | _experts()
            | _same(
                "mlp.gate.e_score_correction_bias",
                at + "o_proj.weight",
                at + "kv_b_proj.weight",
                at + "kv_a_layernorm.weight",
            )
        )
        if facts.get("q_lora_rank"):
            q, kv = facts["q_lora_rank"], facts["kv_lora_rank"] + facts["qk_rope_head_dim"]
            parts = {
                at + "{p=q_a_proj|kv_a_proj_with_mqa}.weight [p d]": at
                + fused
                + ".weight [(q_a_proj|kv_a_proj_with_mqa) d]"
            }
            made = pairs(L, L, parts, q_a_proj=q, kv_a_proj_with_mqa=kv)
            made += pairs(L, L, _same(at + "q_a_layernorm.weight", at + "q_b_proj.weight"), l=facts.layers)
        else:
            made = pairs(L, L, _same(at + "q_proj.weight", at + "kv_a_proj_with_mqa.weight"), l=facts.layers)
        return joined(_top(facts), made, pairs(L, L, names, l=facts.layers), beyond(facts, APART.format(facts.system)))

    return deepseek_v3


def beyond(facts: Facts, because: str) -> Rules:
    """The MTP layers, which number on after the others."""
    more = range(len(facts.layers), len(facts.layers) + facts.get("num_nextn_predict_layers", 1))
    return absent({f"model.layers.{l}.{{rest}}": because for l in more}, facts.lossy)


def gpt_oss(facts: Facts) -> Adapter:
    """vLLM's: rows of gate and up interleaved, as the checkpoint has them."""
    t = "model.layers.{l}."
    sizes = dict(q=facts.heads * facts.head_dim, k=facts.groups * facts.head_dim, v=facts.groups * facts.head_dim)
    qkv = {
        "self_attn.{p=q|k|v}_proj.weight [p d]": "attn.qkv.weight [(q|k|v) d]",
        "self_attn.{p=q|k|v}_proj.bias [p]": "attn.qkv.bias [(q|k|v)]",
    }
    names = {
        "input_layernorm.weight": "attn.norm.weight",
        "post_attention_layernorm.weight": "mlp.norm.weight",
        "self_attn.o_proj.{s=weight|bias}": "attn.o_proj.{s=weight|bias}",
        "self_attn.sinks": "attn.sinks",
        "mlp.router.{s=weight|bias}": "mlp.router.{s=weight|bias}",
        "mlp.experts.gate_up_proj [e d u]": "mlp.experts.w13_weight [e u d]",
        "mlp.experts.gate_up_proj_bias [e u]": "mlp.experts.w13_bias [e u]",
        "mlp.experts.down_proj [e i d]": "mlp.experts.w2_weight [e d i]",
        "mlp.experts.down_proj_bias [e d]": "mlp.experts.w2_bias [e d]",
    }
    top = {
        "model.embed_tokens.weight": "model.embedding.weight",
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    return joined(pairs("", "", top), pairs(L, t, qkv, **sizes), pairs(L, t, names))


def qwen3_next(facts: Facts) -> Adapter:
    linear = _same(
        *(f"linear_attn.{n}.weight" for n in ("in_proj_qkvz", "in_proj_ba", "conv1d", "norm", "out_proj")),
        "linear_attn.A_log",
        "linear_attn.dt_bias",
        "mlp.shared_expert_gate.weight",
    )
    names = NORMS | ATTENTION | _mlp("mlp") | _experts() | _mlp("mlp.shared_expert") | linear
    because = APART.format(facts.system)
    return joined(_top(facts), _qkv(2, facts), pairs(L, L, names), absent({"mtp.{rest}": because}, facts.lossy))


vllm = System(
    name="vllm",
    mark=r".*\.experts\.w13_weight",
    unlike=SGLANG,
    tables=dict(
        qwen3_moe=qwen3_moe,
        mixtral=mixtral,
        deepseek_v3=deepseek("fused_qkv_a_proj"),
        gpt_oss=gpt_oss,
        qwen3_next=qwen3_next,
    ),
    container="memory",
    verified="its source alone, and tensors made by hand after it (Qwen3, DeepSeek-V3, gpt-oss); it was not run",
    source="vllm-project/vllm, files of several commits",
)
sglang = System(
    name="sglang",
    mark=SGLANG,
    tables=dict(
        qwen3_moe=qwen3_moe, mixtral=mixtral, deepseek_v3=deepseek("fused_qkv_a_proj_with_mqa"), qwen3_next=qwen3_next
    ),
    container="memory",
    verified="its source alone, and tensors made by hand after it (DeepSeek-V3); it was not run",
    source="sgl-project/sglang",
)
