"""A tiny model for every class of experts in Transformers: those of `hf` and `hf_zoo`, and what they have not.

model, inputs = build("beam")        # seeded, eager; inputs of its forward
"""

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hf
import hf_zoo as zoo
import torch
import transformers
from torch import Tensor, nn

Config = dict[str, Any]
HEADS = dict(num_key_value_heads=4)
QWEN4 = zoo.LINEAR | dict(
    layer_types=["linear_attention", "full_attention"],
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=12,
    indexer_budget=8,
    indexer_compress_ratio=4,
)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
# what hf_zoo's configurations need to run, and not only to be written
RUN: dict[str, Config] = {
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)),
    "glm4v_moe": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0])),
    "longcat_flash": dict(head_dim=4),
    "bailing_hybrid": HYBRID | HEADS,
    "kimi_linear": HYBRID | dict(linear_num_heads=2, linear_head_dim=8),
    "qwen3_next": HYBRID,
}

# those that run as they are built here: the module, the class, what its configuration needs beyond `hf_zoo.COMMON`
REST: dict[str, tuple[str, str, Config]] = {
    "axk1": ("axk1", "AXK1ForCausalLM", HEADS),
    "axk2": ("axk2", "AXK2ForCausalLM", HEADS),
    "beam": ("beam", "BeamForCausalLM", dict(mlp_layer_types=["dense", "sparse"])),
    "deepseek_ocr2": ("deepseek_ocr2", "DeepseekOcr2TextModel", dict(mlp_layer_types=["dense", "sparse"])),
    "diffusion_gemma": ("diffusion_gemma", "DiffusionGemmaEncoderTextModel", dict(top_k_experts=2)),
    "dots3_note": ("dots3_note", "Dots3NoteForCausalLM", HEADS),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        dict(
            moe_intermediate_size=[24, 20],
            moe_num_experts=8,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
        ),
    ),
    "flint": ("flint", "FlintForCausalLM", dict(mlp_only_layers=[0])),
    "glm5_next": (
        "glm5_next",
        "Glm5NextTextModel",
        HEADS
        | dict(swiglu_limit=0.5, qk_rope_head_dim=0, mlp_layer_types=["dense", "sparse"])
        | dict(linear_num_heads=2, linear_head_dim=8),
    ),
    "hy_v4": ("hy_v4", "HYV4ForCausalLM", dict(swiglu_limit=0.5)),
    "hy_v4_vl": ("hy_v4_vl", "HYV4VLTextModel", zoo.HY_VL | dict(swiglu_limit=0.5)),
    "inkling2": ("inkling2", "Inkling2ForCausalLM", dict(unpadded_vocab_size=61)),
    "inkling2_loop": ("inkling2_loop", "Inkling2LoopForCausalLM", dict(unpadded_vocab_size=61)),
    "kolibri1": ("kolibri1", "Kolibri1ForCausalLM", {}),
    "lara_mini": ("lara_mini", "LaraMiniForCausalLM", {}),
    "mistral_large4": ("mistral_large4", "MistralLarge4TextModel", HEADS),
    "muse_spark": ("muse_spark", "MuseSparkTextModel", dict(moe_hidden_size=28)),
    "openai_privacy_filter": (
        "openai_privacy_filter", "OpenAIPrivacyFilterModel", dict(intermediate_size=24, swiglu_limit=0.5)
    ),
    "qwen3_omni_moe_talker": ("qwen3_omni_moe", "Qwen3OmniMoeTalkerModel", dict(shared_expert_intermediate_size=20)),
    "qwen4_exp": ("qwen4_exp", "Qwen4ExpForCausalLM", QWEN4),
    "step3p7": (
        "step3p7",
        "Step3p7TextModel",
        dict(mlp_layer_types=["sparse", "sparse"], sliding_window=8, swiglu_limits=[0.0, 0.5]),
    ),
    "unlimited_ocr": ("unlimited_ocr", "UnlimitedOcrTextModel", dict(mlp_layer_types=["dense", "sparse"])),
    "zaya": ("zaya", "ZayaForCausalLM", dict(num_experts_per_tok=1)),
}  # fmt: skip
REST = {n: entry for n, entry in REST.items() if entry[1] in zoo.THERE}  # of this Transformers
UNDECORATED = ("llama4_text", "jetmoe", "dbrx", "longcat_flash", "step3p7", "switch_transformers", "nllb-moe")
NAMES = tuple(
    n
    for n in dict.fromkeys((*zoo.MODELS, *hf.MODELS, *REST))
    if (n.removesuffix("_text") not in REST or n in REST) and n != "llama4"  # whose own forward needs an image
)
DECORATED = tuple(name for name in NAMES if name not in UNDECORATED)
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))


def arch(name: str) -> str:
    """The class of `build(name)`."""
    return REST[name][1] if name in REST else zoo.MODELS[name][0] if name in zoo.MODELS else hf.MODELS[name].arch


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The tiny random model of a name, and the inputs of its forward."""
    if name in zoo.MODELS and name not in REST:
        arch, config = zoo.MODELS[name]
        with patch.dict(zoo.MODELS, {name: (arch, config | RUN.get(name, {}))}):
            model = zoo.build(name)
    elif name in hf.MODELS:
        model = hf.build(name)
        model.set_experts_implementation("eager")
    else:
        module, cls, own = REST[name]
        kind: Any = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), cls)
        config = kind.config_class(**zoo.fitting(kind.config_class, zoo.COMMON) | own)
        model = kind._from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
        hf.randomise(model, 0)
    inputs: dict[str, Any] = {"input_ids": IDS, "use_cache": False}
    if name == "qwen3_omni_moe_talker":
        inputs = {
            "inputs_embeds": torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5)),
            "use_cache": False,
        }
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :5]
    return model, inputs


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@cache
def classes() -> dict[str, str]:
    """Every class of the installed Transformers that `use_experts_implementation` decorates -> its module."""
    found: dict[str, str] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for node in ast.parse(path.read_text()).body if "@use_experts_implementation" in path.read_text() else ():
            marks = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
            if any("use_experts_implementation" in mark for mark in marks):
                found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"  # type: ignore[attr-defined]
    return found


def of_class(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a model whose class has this name."""
    return [m for m in model.modules() if type(m).__name__ == name]
