"""gpt-oss as OpenAI published it: q, k and v joined, rows of gate and up interleaved; bf16, or MXFP4 as it is."""

from fmoe.layout.adapter import Adapter
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, joined, pairs

T = "block.{l}."
TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}
NAMES = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.o_proj.{s=weight|bias}": "attn.out.{s=weight|bias}",
    "self_attn.sinks": "attn.sinks",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.{s=weight|bias}": "mlp.gate.{s=weight|bias}",
    "mlp.experts.{p=gate_up_proj_bias|down_proj_bias} [e u]": "mlp.{p=mlp1_bias|mlp2_bias} [e u]",
}
QKV = {
    "self_attn.{p=q|k|v}_proj.weight [p d]": "attn.qkv.weight [(q|k|v) d]",
    "self_attn.{p=q|k|v}_proj.bias [p]": "attn.qkv.bias [(q|k|v)]",
}
PLAIN = {
    "mlp.experts.gate_up_proj [e d u]": "mlp.mlp1_weight [e u d]",
    "mlp.experts.down_proj [e i d]": "mlp.mlp2_weight [e d i]",
}
MXFP4 = {
    f"mlp.experts.{{p=gate_up_proj|down_proj}}_{kind} {axes}": f"mlp.{{p=mlp1_weight|mlp2_weight}}.{kind} {axes}"
    for kind, axes in (("blocks", "[e u n b]"), ("scales", "[e u n]"))
}


def gpt_oss(facts: Facts) -> Adapter:
    sizes = dict(q=facts.heads * facts.head_dim, k=facts.groups * facts.head_dim, v=facts.groups * facts.head_dim)
    names = NAMES | (MXFP4 if facts.keep else PLAIN)
    return joined(pairs("", "", TOP), pairs(L, T, QKV, **sizes), pairs(L, T, names))


gpt_oss_original = System(
    name="gpt_oss_original",
    mark=r"block\.0\.attn\.norm\.scale",
    tables=dict(gpt_oss=gpt_oss),
    container="safetensors",
    kept=("gpt_oss",),
    verified="its source alone, and tensors made by hand after it",
    source="openai/gpt-oss 7b58334",
)
