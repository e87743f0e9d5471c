"""MLX (mlx-lm): safetensors under Hugging Face's names, the experts of a layer in one tensor under `switch_mlp`."""

from fmoe.layout.adapter import Adapter
from fmoe.systems.engines import beyond
from fmoe.systems.gguf import kv_apart
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.nibbles import Words
from fmoe.systems.wording.say import L, Rules, absent, joined, pairs, tied
from fmoe.systems.wording.stages import Value
from fmoe.types import AdapterError

EXPERTS = "{p=gate_proj|up_proj|down_proj}.weight"
MOE = {
    f"mlp.experts.{{e}}.{EXPERTS} [a b]": f"mlp.switch_mlp.{EXPERTS} [e a b]",
    "mlp.gate.weight": "mlp.gate.weight",
    f"mlp.{EXPERTS}": f"mlp.{EXPERTS}",
}
COMMON = {
    n: n
    for n in (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.{p=q|k}_norm.weight",
        "self_attn.{p=q|k|v|o}_proj.{s=weight|bias}",
    )
}


def _top(facts: Facts, t: str = "") -> Rules:
    names = {n: n for n in ("model.embed_tokens.weight", "model.norm.weight")}
    head = {} if facts.tied else {"lm_head.weight": "lm_head.weight"}
    return pairs("", t, names | head) + (tied("lm_head.weight", "model.embed_tokens.weight") if facts.tied else [])


def qwen3_moe(facts: Facts) -> Adapter:
    return joined(_top(facts), pairs(L, L, COMMON | MOE))


def mixtral(facts: Facts) -> Adapter:
    X = "block_sparse_moe."
    names = {
        X + "experts.{e}.{p=w1|w3|w2}.weight [a b]": X + f"switch_mlp.{EXPERTS} [e a b]",
        X + "gate.weight": X + "gate.weight",
    }
    return joined(_top(facts), pairs(L, L, COMMON | names))


def deepseek_v3(facts: Facts) -> Adapter:
    same = [
        "self_attn.{p=q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj}.weight",
        "self_attn.{p=q|kv}_a_layernorm.weight",
        f"mlp.shared_experts.{EXPERTS}",
        "mlp.gate.e_score_correction_bias",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    parts = {
        "self_attn.part_k [h k r]": "self_attn.embed_q.weight [h r k]",
        "self_attn.part_v [h v r]": "self_attn.unembed_out.weight [h v r]",
    }
    names = {n: n for n in same} | parts | MOE
    gone = beyond(facts, "mlx-lm drops the MTP layer")
    return kv_apart(facts) >> joined(_top(facts), pairs(L, L, names, l=facts.layers), gone)


def gpt_oss(facts: Facts) -> Adapter:
    if not facts.keep:
        raise AdapterError("system='mlx' has gpt_oss in MXFP4 only: quantized='keep' moves its blocks as they are")
    X = "mlp.experts."
    names = {
        X + "gate_up_proj_blocks [e (i g) w]": X + "{g=gate_proj|up_proj}.weight [e i w]",
        X + "gate_up_proj_scales [e (i g) n]": X + "{g=gate_proj|up_proj}.scales [e i n]",
        X + "gate_up_proj_bias [e (i g)]": X + "{g=gate_proj|up_proj}.bias [e i]",
        X + "down_proj_blocks [e d w]": X + "down_proj.weight [e d w]",
        X + "down_proj_scales [e d n]": X + "down_proj.scales [e d n]",
        X + "down_proj_bias [e d]": X + "down_proj.bias [e d]",
        "mlp.router.{s=weight|bias}": "mlp.router.{s=weight|bias}",
        "self_attn.sinks": "self_attn.sinks",
    }
    words = Words(r".*\.mlp\.experts\.(gate_up|down)_proj_blocks")
    return Adapter((words,)) >> joined(_top(facts), pairs(L, L, COMMON | names))


def qwen3_next(facts: Facts) -> Adapter:
    linear = [f"linear_attn.{n}.weight" for n in ("norm", "out_proj")] + ["linear_attn.A_log", "linear_attn.dt_bias"]
    linear += ["linear_attn.{p=in_proj_qkvz|in_proj_ba|in_proj_qkv|in_proj_z|in_proj_a|in_proj_b}.weight"]
    shared = [f"mlp.shared_expert.{EXPERTS}", "mlp.shared_expert_gate.weight"]
    names = COMMON | MOE | {n: n for n in (*linear, *shared)}
    names |= {"linear_attn.conv1d.weight [c 1 k]": "linear_attn.conv1d.weight [c k 1]"}
    t = "language_model." if facts.family == "qwen3_5_moe" else ""
    shift = Value(r".*(?<!linear_attn)\.(\w*layernorm|[qk]_norm|norm)\.weight", "shift", 1.0)
    gone = {"mtp.{rest}": "mlx-lm drops the MTP layer", "model.visual.{rest}": "mlx-lm's text model has no tower"}
    table = joined(_top(facts, t), pairs(L, t + L, names), absent(gone, facts.lossy))
    return table >> Adapter((shift,))


mlx = System(
    name="mlx",
    mark=r".*\.switch_mlp\..*|.*\.mlp\.experts\.gate_proj\.scales",
    tables=dict(
        qwen3_moe=qwen3_moe,
        mixtral=mixtral,
        deepseek_v3=deepseek_v3,
        gpt_oss=gpt_oss,
        qwen3_next=qwen3_next,
        qwen3_5_moe=qwen3_next,
    ),
    container="safetensors",
    kept=("gpt_oss",),
    verified="mlx-lm's own sanitize and models, run; norms + 1 to within their bound",
    source="mlx-lm 0.32.2 (d78bf58), mlx 0.32.4",
)
