"""NeMo Automodel: our native layout, which is its, and the names of its own that a few families have beyond experts.

Its loader looks tensors up by exactly these names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmoe.codecs import Change, Changed, CodecPlan
from fmoe.families.known import class_of
from fmoe.layout.adapter import Adapter
from fmoe.layout.build import either
from fmoe.layout.grouping import Specs, Window
from fmoe.layout.names import Names
from fmoe.systems.automodel_deepseek import deepseek_v4, deepseek_v41
from fmoe.systems.system import System
from fmoe.systems.wording.facts import Facts
from fmoe.systems.wording.say import absent, joined, pairs, rest
from fmoe.systems.wording.stages import Fill, Stateless
from fmoe.types import AdapterError, Problem, TensorSpec

LAYER = "{pre}layers.{l}."


def qwen3_omni_moe(facts: Facts) -> Adapter:
    gone = {"{p=talker|code2wav}.{rest}": "Automodel trains the thinker alone"}
    return joined(
        pairs(
            "thinker.",
            "",
            {"{p=model|lm_head|visual|audio_tower}.{rest}": "{p=model|lm_head|visual|audio_tower}.{rest}"},
        ),
        absent(gone, facts.lossy),
    )


def ling_v2(facts: Facts) -> Adapter:
    d, head = facts.head_dim, {}
    if not facts.tied:
        head = {"lm_head.{rest}": "lm_head.{rest}"}
    layer = {
        "attention.dense.{s=weight|bias}": "self_attn.o_proj.{s=weight|bias}",
        "attention.{p=query|key}_layernorm.weight": "self_attn.{p=q|k}_norm.weight",
    }
    qkv = {
        "attention.query_key_value.weight [(q|k|v) d]": "self_attn.{p=q|k|v}_proj.weight [p d]",
        "attention.query_key_value.bias [(q|k|v)]": "self_attn.{p=q|k|v}_proj.bias [p]",
    }
    sizes = dict(q=facts.heads * d, k=facts.groups * d, v=facts.groups * d)
    top = {"{pre}word_embeddings.weight": "{pre}embed_tokens.weight"} | head
    return joined(pairs("", "", top), pairs(LAYER, LAYER, layer), pairs(LAYER, LAYER, qkv, **sizes), [rest()])


FP32 = {LAYER + "self_attn.{p=A_log|dt_bias}": LAYER + "self_attn._fp32_params.{p=A_log|dt_bias}"}


def kimi_linear(facts: Facts) -> Adapter:
    return joined(pairs("", "", FP32), [rest()])


def kimi_k3(facts: Facts) -> Adapter:
    strip = {"language_model.{p=model|lm_head}.{rest}": "{p=model|lm_head}.{rest}"}
    return joined(pairs("", "", strip), [rest()]) >> joined(pairs("", "", FP32), [rest()])


def kimi_k25(facts: Facts) -> Adapter:
    return joined(
        pairs("", "", {"language_model.{p=model|lm_head}.{rest}": "model.language_model.{p=model|lm_head}.{rest}"}),
        pairs("mm_projector.proj.", "multi_modal_projector.linear_", {"{i=0|2}.{rest}": "{i=1|2}.{rest}"}),
        [rest()],
    )


def mistral4(facts: Facts) -> Adapter:
    """A correction bias of zeros beside every router, which has none on disk."""
    inside, zeros = "text_config" in facts.config, r"\1.e_score_correction_bias"
    bias = Adapter((Fill(r"(.*\.mlp\.gate)\.weight", zeros, lossy=facts.lossy),))
    both = "{p=model|lm_head}.{rest}"
    if inside:
        strip = {"language_model." + both: "model.language_model." + both}
        towers = "{p=vision_tower|multi_modal_projector}.{rest}"
        return joined(pairs("", "", strip | {towers: "model." + towers}), [rest()]) >> bias
    published, text = (joined(pairs(prefix, "", {both: both})) for prefix in ("language_model.", ""))
    names = either("names", published=published, text=text)
    if class_of(facts.config) == "Mistral4ForCausalLM":  # Transformers' text model alone
        names = either("names", text=text, published=published)
    return joined([names], [rest()]) >> bias


def inkling(facts: Facts) -> Adapter:
    """Gate and up in turn, as on disk."""
    names = {
        "mlp.experts.gate_and_up_projs [e d (g i)]": "mlp.experts.gate_and_up_projs [e d (i g)]",
        "mlp.gate.e_score_correction_bias": "mlp.gate._fp32_params.e_score_correction_bias",
    }
    prefix = {"model.llm.{rest}": "model.language_model.{rest}"}
    return joined(pairs(LAYER, LAYER, names, g=2), [rest()]) >> joined(pairs("", "", prefix), [rest()])


def step3p7(facts: Facts) -> Adapter:
    n = facts.get("mtp_base_layer_idx", len(facts.layers))
    inside = {"model.{p=embed_tokens|norm}.{rest}": "model.language_model.{p=embed_tokens|norm}.{rest}"}
    made = pairs("", "", inside) + pairs(
        "model.layers.{l}.", "model.language_model.layers.{l}.", {"{rest}": "{rest}"}, l=range(n)
    )
    made += pairs(f"model.layers.{{l=k+{n}}}.", "mtp.layers.{k}.", {"{rest}": "{rest}"})
    towers = {"{p=vision_model|vit_large_projector}.{rest}": "model.{p=vision_model|vit_large_projector}.{rest}"}
    return joined(made, pairs("", "", towers), [rest()])


def minimax_m3(facts: Facts) -> Adapter:
    layer = {
        "mlp.shared_experts.{rest}": "shared_experts.{rest}",
        "self_attn.index_{rest}": "self_attn.indexer.index_{rest}",
    }
    made = joined(pairs(LAYER, LAYER, layer), [rest()])
    if "text_config" not in facts.config and facts.config.get("model_type") == "minimax_m3_vl_text":
        return made
    strip = {"language_model.{p=model|lm_head}.{rest}": "{p=model|lm_head}.{rest}"}
    towers = {
        f"{{p={tower}}}.{{rest}}": f"vision_tower.{{p={tower}}}.{{rest}}"
        for tower in ("multi_modal_projector|patch_merge_mlp",)
    }
    return joined(pairs("", "", strip | towers), [rest()]) >> made


def gemma4(facts: Facts) -> Adapter:
    """The scale of each expert multiplied into its down matrix."""
    return Adapter((Folded(r"(.*\.moe\.)experts\.down_projs", r"\1gate.per_expert_scale"),))


@dataclass(frozen=True)
class Folded(Stateless):
    """down[e] * scale[e], for every tensor that fits the pattern and has that scale; backwards the scale is ones."""

    pattern: str
    scale: str
    flipped: bool = False
    lossless: bool = False

    @property
    def inverse(self) -> "Folded":
        return replace(self, flipped=not self.flipped)

    def plan(self, specs: Specs, names: Names, window: Window, local: frozenset[str]) -> CodecPlan:
        both = {n: m.expand(self.scale) for n in specs if (m := re.fullmatch(self.pattern, n))}
        if self.flipped:
            ones = {s: TensorSpec(specs[n].shape[:1], specs[n].dtype) for n, s in both.items()}
            made = tuple(Changed([n], [n, s], _ones(n, s), {n: 1, s: 1}) for n, s in both.items())
            return CodecPlan({**specs, **ones}, made, str(self))
        both = {n: s for n, s in both.items() if s in specs}
        gone, parts = set(both.values()), {n: _part(n, s, specs, window) for n, s in both.items()}
        rows = lambda n, s: {n: 1, s: 1} if parts[n] is None else {}
        changes = tuple(Changed([n, s], [n], _folded(n, s, parts[n]), rows(n, s)) for n, s in both.items())
        return CodecPlan({n: spec for n, spec in specs.items() if n not in gone}, changes, str(self))

    def __str__(self) -> str:
        return f"{self.pattern}: times {self.scale}; back, that is ones" + " (backwards)" * self.flipped


def _part(name: str, scale: str, specs: Specs, window: Window) -> range | None:
    """The experts that a stack holds, of those that have scales; None: all."""
    (held, *_), of = specs[name].shape, specs[scale].shape
    part = window.get("e")
    if of == (held,):
        return None
    if part is None or len(part) != held or len(of) != 1 or part.stop > of[0]:
        text = f"{scale!r}: shape {list(of)}, expected one for each of the {held} experts of {name!r}"
        raise AdapterError([Problem(text, (scale, name))])
    return part


def _folded(name: str, scale: str, part: range | None) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scales = params[scale] if part is None else params[scale][part.start : part.stop]
        return {name: params[name] * scales.to(params[name].dtype)[:, None, None]}

    return change


def _ones(name: str, scale: str) -> Change:
    def change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        down = params[name]
        return {name: down, scale: torch.ones(down.shape[:1], dtype=down.dtype, device=down.device)}

    return change


automodel = System(
    name="automodel",
    tables=dict(
        qwen3_omni_moe=qwen3_omni_moe,
        bailing_moe=ling_v2,
        bailing_moe_v2=ling_v2,
        kimi_linear=kimi_linear,
        kimi_k3=kimi_k3,
        kimi_k25=kimi_k25,
        mistral4=mistral4,
        inkling_mm_model=inkling,
        step3p7=step3p7,
        minimax_m3_vl_text=minimax_m3,
        minimax_m3_vl=minimax_m3,
        gemma4_text=gemma4,
        gemma4=gemma4,
        deepseek_v4=deepseek_v4,
        deepseek_v41=deepseek_v41,
        deepseek_v41_text=deepseek_v41,
    ),
    native=True,
    container="safetensors",
    verified="DeepSeek-V4, V4.1 and its draft by Automodel's own adapters, run beside ours; the others by tensors made "
    "by hand after the research page, which was read off them",
    source="NeMo Automodel 0.5.0 and 0.7.0",
)
