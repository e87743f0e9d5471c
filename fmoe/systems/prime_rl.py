"""prime-rl at 559b447: Hugging Face's names, the experts of a layer in one tensor each, the router under `mlp.router`.

A moving target: a week later it had `gate_proj`, `up_proj`, `down_proj` and `router.selection_bias`.
"""

from fmoe.layout.adapter import Adapter
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, absent, joined, pairs, tied

EXPERTS = "{p=gate_proj|up_proj|down_proj}.weight"
SAME = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.{p=q|k|v|o}_proj.{s=weight|bias}",
    "self_attn.{p=q|k}_norm.weight",
    f"mlp.{EXPERTS}",
]
LINEAR = [
    "linear_attn.{p=in_proj_qkv|in_proj_z|in_proj_a|in_proj_b|conv1d|norm|out_proj}.weight",
    "linear_attn.{p=A_log|dt_bias}",
    "mlp.shared_expert_gate.weight",
]
MOE = {
    f"mlp.experts.{{e}}.{EXPERTS} [a b]": "mlp.experts.{p=w1|w3|w2} [e a b]",
    "mlp.gate.weight": "mlp.router.gate.weight",
}


def _table(facts: Facts, names: dict[str, str], t: str = "model.") -> Adapter:
    top = {f"model.{n}.weight": f"{t}{n}.weight" for n in ("embed_tokens", "norm")}
    head = {} if facts.tied else {"lm_head.weight": "lm_head.weight"}
    made = pairs("", "", top | head) + pairs(L, t + "layers.{l}.", names)
    return joined(
        made,
        tied("lm_head.weight", "model.embed_tokens.weight") if facts.tied else [],
        absent({"mtp.{rest}": "prime-rl has no MTP layer", "model.visual.{rest}": "text alone"}, facts.lossy),
    )


def qwen3_moe(facts: Facts) -> Adapter:
    return _table(facts, {n: n for n in SAME} | MOE)


def qwen3_5_moe(facts: Facts) -> Adapter:
    whole = "text_config" in facts.config
    shared = {f"mlp.shared_expert.{EXPERTS}": "mlp.shared_expert.{p=w1|w3|w2}.weight"}
    names = {n: n for n in (*SAME[:-1], *LINEAR)} | MOE | shared
    return _table(facts, names, "model.language_model." if whole else "model.")


prime_rl = System(
    name="prime_rl",
    mark=r".*\.mlp\.router\.gate\.weight",
    tables=dict(qwen3_moe=qwen3_moe, qwen3_5_moe=qwen3_5_moe),
    container="safetensors",
    verified="its own conversion, run",
    source="PrimeIntellect-ai/prime-rl 559b447",
)
