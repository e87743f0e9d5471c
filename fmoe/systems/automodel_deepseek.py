"""Automodel's names of DeepSeek-V4 and V4.1, from those of each who writes such files."""

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import Rules, joined, pairs, rest

TOP = {"embed.{rest}": "model.embed_tokens.{rest}", "head.{rest}": "lm_head.{rest}"}
HC = {"hc_{m=attn|ffn}_{p=fn|base|scale}": "{m=attn|ffn}_hc.{p=fn|base|scale}"}
HEAD = {"hc_head_{p=fn|base|scale}": "hc_head.hc_{p=fn|base|scale}", "norm.weight": "norm.weight"}
NORMS = {"{p=attn_norm|ffn_norm}.weight": "{p=input_layernorm|post_attention_layernorm}.weight"}


def compressor(here: str, there: str, kv: str, gate: str, norm: str, ape: str) -> dict[str, str]:
    """What presses tokens together: of attention, and of its indexer."""
    words = {kv + ".{rest}": "wkv.{rest}", gate + ".{rest}": "wgate.{rest}", norm: "kv_norm.weight"}
    return {here + name: there + ours for name, ours in (words | {ape: "ape_param.weight"}).items()}


def layer(kv_norm: str = "attn.kv_norm.{rest}") -> dict[str, str]:
    """A layer as published; Transformers writes another name for one norm."""
    parts, words = "{p=wq_a|wq_b|wkv|wo_a|wo_b|q_norm}.{rest}", ("wkv", "wgate", "norm.weight", "ape")
    return {
        "attn.attn_sink": "self_attn.sinks_param.weight",
        "attn." + parts: "self_attn." + parts,
        kv_norm: "self_attn.kv_norm.{rest}",
        "attn.indexer.{p=wq_b|weights_proj}.{rest}": "self_attn.compressor.indexer.{p=wq_b|weights_proj}.{rest}",
        **compressor("attn.compressor.", "self_attn.compressor.", *words),
        **compressor("attn.indexer.compressor.", "self_attn.compressor.indexer.", *words),
        **NORMS,
        **HC,
        "mlp.{rest}": "mlp.{rest}",
    }


def in_memory() -> dict[str, str]:
    """A layer as Transformers holds it."""
    theirs = "self_attn.{p=q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj|q_a_norm|kv_norm}.{rest}"
    i, index = "self_attn.compressor.indexer.", "{p=q_b_proj|scorer.weights_proj}"
    same = "{p=input_layernorm|post_attention_layernorm|attn_hc|ffn_hc|mlp}.{rest}"
    words = ("kv_proj", "gate_proj", "kv_norm.weight", "position_bias")
    return {
        "self_attn.sinks": "self_attn.sinks_param.weight",
        theirs: "self_attn.{p=wq_a|wq_b|wkv|wo_a|wo_b|q_norm|kv_norm}.{rest}",
        f"{i}{index}.{{rest}}": i + "{p=wq_b|weights_proj}.{rest}",
        **compressor("self_attn.compressor.", "self_attn.compressor.", *words),
        **compressor(i, i, *words),
        same: same,
    }


def inside(layers: dict[str, str], head: str) -> Rules:
    """Below `model.`, as Transformers writes."""
    same = "model.{p=embed_tokens|norm|hc_head}.{rest}"
    return pairs("", "", {same: same, head: "lm_head.{rest}"}) + pairs("model.layers.{l}.", "model.layers.{l}.", layers)


def deepseek_v4(facts: Facts) -> Adapter:
    """The indexer inside the compressor, and the draft's stages as layers."""
    stage = "{p=e_proj|h_proj|enorm|hnorm}.{rest}"
    published = joined(
        pairs("", "", TOP),
        pairs("", "model.", HEAD),
        pairs("layers.{l}.", "model.layers.{l}.", layer()),
        pairs("mtp.{l}.", "mtp.layers.{l}.", layer() | HEAD | {stage: stage}),
    )
    names = either(
        "names",
        published=published,
        transformers=joined(inside(layer("attn.norm.{rest}"), "head.{rest}")),
        in_memory=joined(inside(in_memory(), "lm_head.{rest}")),
    )
    return joined([names], [rest()])


def deepseek_v41(facts: Facts) -> Adapter:
    """The model's names below `model.`; the draft's (`mtp`) as on disk, where its adapter of its own looks."""
    inside = ("{p=layers|norm|vision|aligner}.{rest}", "{p=image_start|image_end|image_newline}")
    return joined(pairs("", "", TOP), pairs("", "model.", {name: name for name in inside}), [rest()])
