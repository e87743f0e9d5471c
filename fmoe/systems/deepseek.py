"""DeepSeek's own inference format for DeepSeek-V3, all ranks' parts joined; in FP8 with `.scale` beside a weight."""

from fmoe.layout.adapter import Adapter
from fmoe.systems.engines import beyond
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, joined, pairs

T = "layers.{l}."
EXPERTS = "{p=gate_proj|up_proj|down_proj}"
MATRICES = {
    "self_attn.{p=q|q_a|q_b|kv_b|o}_proj": "attn.{p=wq|wq_a|wq_b|wkv_b|wo}",
    "self_attn.kv_a_proj_with_mqa": "attn.wkv_a",
    f"mlp.{EXPERTS}": "ffn.{p=w1|w3|w2}",
    f"mlp.shared_experts.{EXPERTS}": "ffn.shared_experts.{p=w1|w3|w2}",
    f"mlp.experts.{{e}}.{EXPERTS}": "ffn.experts.{e}.{p=w1|w3|w2}",
}
OTHER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.{p=q|kv}_a_layernorm.weight": "attn.{p=q|kv}_norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
}
TOP = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"}


def deepseek_v3(facts: Facts) -> Adapter:
    weights = {f"{a}.weight": f"{b}.weight" for a, b in MATRICES.items()}
    scales = {f"{a}.weight_scale_inv": f"{b}.scale" for a, b in MATRICES.items()} if facts.keep else {}
    gone = beyond(facts, "DeepSeek's inference code leaves the MTP layer out")
    return joined(pairs("", "", TOP), pairs(L, T, OTHER | weights | scales, l=facts.layers), gone)


deepseek = System(
    name="deepseek",
    mark=r"layers\.0\.attn\.wkv_a\.weight",
    tables=dict(deepseek_v3=deepseek_v3),
    container="safetensors",
    kept=("deepseek_v3",),
    verified="its own convert.py, run (bf16); the names of scales by its source alone",
    source="deepseek-ai/DeepSeek-V3 9b4e978",
)
