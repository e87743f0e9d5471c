"""MaxText: tree paths joined with `-`, kernels [in .. out], heads as axes; scanned, the layer is the second axis."""

import re

from fmoe.layout.adapter import Adapter
from fmoe.systems.engines import beyond
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import L, Rules, joined, pairs, rest, tied
from fmoe.systems.wording.stages import Value
from fmoe.types import AdapterError

D = "params-decoder-"
Names = dict[str, str]


def _scan(facts: Facts) -> bool:
    return bool(facts.choices["scan"])


def _top(facts: Facts) -> Rules:
    names = {
        "model.embed_tokens.weight": "params-token_embedder-embedding",
        "model.norm.weight": D + "decoder_norm-scale",
    }
    head = {"lm_head.weight [v d]": D + "logits_dense-kernel [d v]"}
    made = pairs("", "", names if facts.tied else names | head)
    return made + (tied("lm_head.weight", "model.embed_tokens.weight") if facts.tied else [])


def _laid(facts: Facts, names: Names) -> Names:
    """With the layer as second axis, or with none."""
    second = lambda m: f"[{m[1]} l{m[2]}]"
    put = lambda t: re.sub(r"\[(\w+|\([^)]*\))([^\]]*)\]", second, t)
    return {h: put(t) for h, t in names.items()} if _scan(facts) else names


def _at(facts: Facts, name: str = "layers") -> str:
    return D + (f"{name}-" if _scan(facts) else name + "_{l}-")


def _attention(at: str = "self_attention") -> Names:
    return {
        "self_attn.{p=q|k|v}_proj.weight [(h c) d]": at + "-{p=query|key|value}-kernel [d h c]",
        "self_attn.o_proj.weight [d (h c)]": at + "-out-kernel [h c d]",
        "self_attn.{p=q|k}_norm.weight [c]": at + "-{p=query|key}_norm-scale [c]",
    }


NORMS = {
    "input_layernorm.weight [d]": "pre_self_attention_layer_norm-scale [d]",
    "post_attention_layernorm.weight [d]": "post_self_attention_layer_norm-scale [d]",
}


def _moe(block: str, experts: str = "mlp.experts.{e}.{p=gate_proj|up_proj|down_proj}", gate: str = "mlp.gate") -> Names:
    return {
        f"{experts}.weight [a b]": block + "-{p=wi_0|wi_1|wo} [e b a]",
        f"{gate}.weight [u d]": block + "-gate-kernel [d u]",
    }


def qwen3_moe(facts: Facts) -> Adapter:
    names = _attention() | NORMS | _moe("moe_block")
    return joined(_top(facts), pairs(L, _at(facts), _laid(facts, names), c=facts.head_dim, l=facts.layers))


def mixtral(facts: Facts) -> Adapter:
    names = (
        _attention() | NORMS | _moe("MoeBlock_0", "block_sparse_moe.experts.{e}.{p=w1|w3|w2}", "block_sparse_moe.gate")
    )
    table = joined(_top(facts), pairs(L, _at(facts), _laid(facts, names), c=facts.head_dim, l=facts.layers))
    return table >> Adapter((Value(r"params-decoder-.*-query-kernel", "times", facts.head_dim**-0.5),))


def deepseek_v3(facts: Facts) -> Adapter:
    rope, nope, v = facts["qk_rope_head_dim"], facts["qk_nope_head_dim"], facts["v_head_dim"]
    X, S, B = "self_attn.", "self_attention-", "DeepSeekMoeBlock_0-"
    plain = {
        X + "q_a_proj.weight [r d]": S + "wq_a-kernel [d r]",
        X + "q_a_layernorm.weight [r]": S + "q_norm-scale [r]",
        X + "kv_a_proj_with_mqa.weight [r d]": S + "wkv_a-kernel [d r]",
        X + "kv_a_layernorm.weight [r]": S + "kv_norm-scale [r]",
    }
    heads = [
        (
            {
                X + "q_b_proj.weight [(h c) r]": S + "wq_b-kernel [r h c]",
                X + "q_proj.weight [(h c) d]": S + "query-kernel [d h c]",
            },
            nope + rope,
        ),
        ({X + "kv_b_proj.weight [(h c) r]": S + "wkv_b-kernel [r h c]"}, nope + v),
        ({X + "o_proj.weight [d (h c)]": S + "out-kernel [h c d]"}, v),
    ]
    mlp = {"mlp.{p=gate_proj|up_proj|down_proj}.weight [a b]": "mlp-{p=wi_0|wi_1|wo}-kernel [b a]"}
    shared = {
        "mlp.shared_experts.{p=gate_proj|up_proj|down_proj}.weight [a b]": B
        + "shared_experts-{p=wi_0|wi_1|wo}-kernel [b a]"
    }
    moe = _moe(B + "MoeBlock_0") | shared | {"mlp.gate.e_score_correction_bias [u]": B + "MoeBlock_0-gate-bias [u]"}
    made = _top(facts)
    first = len(facts.dense)
    for name, own, layers, shift in (("dense_layers", mlp, facts.dense, 0), ("moe_layers", moe, facts.sparse, first)):
        h = f"model.layers.{{n=l+{shift}}}." if shift else L
        bound = {"l": range(len(layers))}
        made += pairs(h, _at(facts, name), _laid(facts, NORMS | plain | own), **bound)
        for names, c in heads:
            made += pairs(h, _at(facts, name), _laid(facts, names), h=facts.heads, c=c, **bound)
    return joined(made, beyond(facts, "MaxText has no MTP layer in these names"))


def gpt_oss(facts: Facts) -> Adapter:
    A, B = "GptOssAttention-", "GptOssMlp-"
    names = NORMS | {
        "self_attn.{p=q|k|v}_proj.weight [(h c) d]": A + "{p=query|key|value}-kernel [d h c]",
        "self_attn.{p=q|k|v}_proj.bias [(h c)]": A + "{p=query|key|value}-bias [h c]",
        "self_attn.o_proj.weight [d (h c)]": A + "out-kernel [h c d]",
        "self_attn.o_proj.bias [d]": A + "out-bias [d]",
        "self_attn.sinks [h]": A + "sinks [h]",
        "mlp.router.weight [u d]": B + "gate-kernel [d u]",
        "mlp.router.bias [u]": B + "gate-bias [u]",
        "mlp.experts.gate_up_proj [e d (i g)]": B + "{g=wi_0|wi_1} [e d i]",
        "mlp.experts.gate_up_proj_bias [e (i g)]": B + "{g=wi_0_bias|wi_1_bias} [e i]",
        "mlp.experts.down_proj [e i d]": B + "wo [e i d]",
        "mlp.experts.down_proj_bias [e d]": B + "wo_bias [e d]",
    }
    if not _scan(facts):
        return joined(_top(facts), pairs(L, _at(facts), names, c=facts.head_dim, l=facts.layers))
    if len(facts.layers) % 2:
        raise AdapterError(f"system='maxtext' scans gpt-oss in cycles of 2: num_hidden_layers={len(facts.layers)}")
    stacked = {h: t.replace("[", "[l ") for h, t in names.items()}
    apart = [t for t in stacked.values()]
    cycles = {_cycle(t)[0]: _cycle(t)[1] for t in apart}
    first = pairs(L, "stacked-", stacked, c=facts.head_dim, l=facts.layers)
    second = pairs("stacked-", D + "layers-layers_{j}-", cycles, j=2)
    return joined(first, [rest()]) >> joined(second, _top(facts))


def _cycle(there: str) -> tuple[str, str]:
    """name [l a ..] as name [(b j) a ..] <-> name [a b ..]: of one kind of layer the cycle is the second axis."""
    name, _, axes = there.removesuffix("]").partition(" [l ")
    first, *others = axes.split()
    return f"{name} [(b j) {axes}]", f"{name} [{' '.join([first, 'b', *others])}]"


maxtext = System(
    name="maxtext",
    mark=r"params-.*",
    tables=dict(qwen3_moe=qwen3_moe, mixtral=mixtral, deepseek_v3=deepseek_v3, gpt_oss=gpt_oss),
    choices={"scan": (False, True)},
    container="orbax",
    verified="its own mappings and hooks, run on a CPU, scanned (Qwen3, Mixtral, DeepSeek-V3); "
    "gpt-oss, and layers with numbers, by tensors made by hand after its source; "
    "the container by orbax-checkpoint 0.12.8, both ways",
    source="AI-Hypercomputer/maxtext e591f30",
)
