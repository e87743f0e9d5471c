"""Tiny configurations of the Mixture-of-Experts classes of Transformers: what `hf.MODELS` has not.

    model = build("olmoe")       # seeded; eval mode; no expert matrix is square

A configuration is `COMMON`, as far as its class has such fields, and what the family itself needs.
"""

import copy
import inspect
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hf
import torch
import transformers
from checkpoints import hf_multimodal
from checkpoints.hf_multimodal import LATENT, LOOP, NARROW

Config = dict[str, Any]
_FOLDER = TemporaryDirectory()

COMMON: Config = hf.BASE | dict(
    intermediate_size=40,
    num_hidden_layers=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    shared_intermediate_size=20,
    num_experts=8,
    n_routed_experts=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_topk=2,
    moe_k=2,
    n_shared_experts=1,
    num_shared_experts=1,
    first_k_dense_replace=0,
    num_dense_layers=0,
    n_group=2,
    topk_group=1,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    pad_token_id=0,
)
INDEXED = LATENT | dict(index_n_heads=2, index_head_dim=8)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
LINEAR = dict(linear_key_head_dim=6, linear_value_head_dim=10, linear_num_key_heads=2, linear_num_value_heads=4)
DBRX = dict(
    d_model=32,
    n_heads=4,
    n_layers=2,
    ffn_config=dict(ffn_hidden_size=24, hidden_size=32, moe_num_experts=8, moe_top_k=2),
    attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
)

MODELS: dict[str, tuple[str, Config]] = {
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria_text": ("AriaTextForCausalLM", NARROW | dict(moe_num_experts=8, moe_num_shared_experts=2)),
    "bailing_hybrid": ("BailingHybridForCausalLM", HYBRID | LATENT),
    "dbrx": ("DbrxForCausalLM", DBRX),
    "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT | dict(topk_method="group_limited_greedy")),
    "deepseek_v32": ("DeepseekV32ForCausalLM", INDEXED),
    "dots1": ("Dots1ForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", dict(moe_num_experts=8, moe_layer_start_index=0)),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", NARROW),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        dict(enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", LATENT),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", INDEXED),
    "granitemoe": ("GraniteMoeForCausalLM", NARROW),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", NARROW),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        NARROW | dict(layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=8, mamba_expand=2),
    ),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", NARROW),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", NARROW),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "jamba": ("JambaForCausalLM", NARROW | dict(use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1)),
    "jetmoe": ("JetMoeForCausalLM", NARROW | dict(kv_channels=8)),
    "kimi_linear": ("KimiLinearForCausalLM", HYBRID | LATENT | dict(linear_num_heads=2, linear_head_dim=8)),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", dict(layer_types=["conv", "full_attention"])),
    "llama4_text": ("Llama4ForCausalLM", NARROW | dict(intermediate_size_mlp=40)),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        LATENT | dict(num_layers=1, ffn_hidden_size=40, expert_ffn_hidden_size=24, zero_expert_num=4, head_dim=4),
    ),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", NARROW | dict(layer_types=["linear_attention", "full_attention"])),
    "minimax_m2": ("MiniMaxM2ForCausalLM", NARROW),
    "mistral4": ("Mistral4ForCausalLM", LATENT),
    "olmoe": ("OlmoeForCausalLM", NARROW),
    "phimoe": ("PhimoeForCausalLM", NARROW),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", HYBRID | LINEAR),
    "solar_open": ("SolarOpenForCausalLM", {}),
}


MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2]))
MROPE_GLM = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0]))
THERE = frozenset(dir(transformers))  # hasattr would import them all
HY_VL: Config = dict(vision_config=dict(max_image_size=16), mlp_layer_types=["dense", "sparse"])
HY_VL |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 0]))
VISION: Config = hf.VISION | dict(num_attention_heads=2, num_hidden_layers=1, image_size=16)
VISION |= dict(adapter_in_dim=16, adapter_out_dim=32)
AUDIO: Config = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=20, output_dim=32)
AUDIO |= dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, adapter_input_size=16)
AUDIO |= dict(adapter_out_dim=32, downsample_hidden_size=8)
T5 = dict(d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4)
NLLB: Config = {f"{side}_{n}": v for side in ("encoder", "decoder") for n, v in dict(
    layers=2, ffn_dim=24, attention_heads=4, sparse_step=2).items()}  # fmt: skip

MODELS |= {
    "cohere2_moe": ("Cohere2MoeForCausalLM", NARROW),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        dict(o_lora_rank=8, o_groups=2, num_key_value_heads=1, index_n_heads=2, index_head_dim=8, head_dim=16)
        | dict(hc_mult=2, swiglu_limit=0.5, mlp_layer_types=["hash_moe", "moe"]),
    ),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", MROPE_GLM),
    "inkling_text": ("InklingForCausalLM", {}),
    "minimax_m3_vl_text": ("MiniMaxM3VLForCausalLM", NARROW | dict(swiglu_limit=0.5)),
    "nllb-moe": ("NllbMoeForConditionalGeneration", NLLB | dict(d_model=32, num_experts=4)),
    "qwen3_omni_moe_thinker": ("Qwen3OmniMoeThinkerForConditionalGeneration", MROPE),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", MROPE),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        T5 | dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    ),
}

SPARSE = dict(mlp_layer_types=["sparse", "sparse"])
SLIDING = dict(layer_types=["sliding_attention", "indexed_attention"], shared_experts_intermediate_size=20)
QWEN4 = HYBRID | LINEAR | dict(hc_count=2, hc_lowrank=4, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=12)
QWEN4 |= dict(indexer_budget=8, indexer_compress_ratio=4)
KDA = dict(qk_rope_head_dim=0, linear_head_dim=8, linear_num_heads=4)
HYPER = INDEXED | dict(hc_mult=2, swiglu_limit=0.5)
MODELS |= {
    "axk1": ("AXK1ForCausalLM", LATENT),
    "axk2": ("AXK2ForCausalLM", INDEXED | dict(n_group=None, topk_group=None, gated_norm_rank=4)),
    "beam": ("BeamForCausalLM", SPARSE),
    "deepseek_ocr2_text": ("DeepseekOcr2TextModel", SPARSE | dict(n_group=None, topk_group=None)),
    "dots3_note": (
        "Dots3NoteForConditionalGeneration",
        INDEXED
        | SLIDING
        | dict(vision_config=dict(pyramid_num_routed=[4, 6], num_hidden_layers=2, moe_intermediate_size=20)),
    ),
    "dots3_note_text": (
        "Dots3NoteForCausalLM",
        INDEXED | SLIDING,
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        SPARSE
        | dict(moe_num_experts=8, moe_intermediate_size=[24, 20])
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
    ),
    "flint": ("FlintForCausalLM", dict(mlp_only_layers=[])),
    "glm4v_moe_text": ("Glm4vMoeTextModel", MROPE_GLM),
    "glm5_next": ("Glm5NextForConditionalGeneration", SPARSE | HYPER | KDA),
    "glm5_next_text": ("Glm5NextTextModel", SPARSE | HYPER | KDA),
    "hy_v4": ("HYV4ForCausalLM", HYPER | dict(mlp_layer_types=["dense", "sparse"])),
    "hy_v4_vl": ("HYV4VLForConditionalGeneration", HYPER | HY_VL),
    "hy_v4_vl_text": ("HYV4VLTextModel", HYPER | HY_VL),
    "inkling2_text": ("Inkling2ForCausalLM", dict(unpadded_vocab_size=61)),
    "inkling2_loop": ("Inkling2LoopForConditionalGeneration", LOOP),
    "inkling2_loop_text": ("Inkling2LoopForCausalLM", dict(unpadded_vocab_size=61)),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "lara_mini": ("LaraMiniForCausalLM", {}),
    "mistral_large4_text": ("MistralLarge4TextModel", INDEXED),
    "muse_spark_text": ("MuseSparkTextModel", dict(moe_hidden_size=28)),
    "openai_privacy_filter": ("OpenAIPrivacyFilterForTokenClassification", NARROW),
    "qwen3_omni_moe_text": ("Qwen3OmniMoeThinkerTextModel", MROPE),
    "qwen3_vl_moe_text": ("Qwen3VLMoeTextModel", MROPE),
    "qwen4_exp": ("Qwen4ExpForConditionalGeneration", QWEN4),
    "qwen4_exp_text": ("Qwen4ExpForCausalLM", QWEN4),
    "unlimited_ocr_text": ("UnlimitedOcrTextModel", SPARSE | dict(n_group=None, topk_group=None)),
    "zaya": ("ZayaForCausalLM", dict(num_experts_per_tok=1, router_hidden_size=12)),
}
MODELS |= hf_multimodal.MODELS
LATER = {name for name, entry in MODELS.items() if entry[0] not in THERE}
MODELS = {name: entry for name, entry in MODELS.items() if name not in LATER}
"""Of this Transformers: some models came with its last releases."""
BORROWED = ("sarvam_mla", "sarvam_moe")
"""Model types that Transformers builds with a class of another."""


def build(name: str, seed: int = 0) -> Any:
    """The tiny random model of `MODELS[name]`, in fp32."""
    arch, own = MODELS[name]
    cls = getattr(transformers, arch)
    model = cls._from_config(config(cls, own), dtype=torch.float32, experts_implementation="eager").eval()
    hf.randomise(model, seed)
    return model


def config(cls: Any, own: Config) -> Any:
    """A class's tiny config: `COMMON`, as far as it has such fields, and its own, those of `whole` outside of parts."""
    parts = getattr(cls.config_class, "sub_configs", {})
    if "text_config" not in parts:
        return cls.config_class(**fitting(cls.config_class, COMMON) | own)
    tiny, own = dict(text_config=COMMON, vision_config=VISION, audio_config=AUDIO), copy.deepcopy(own)
    whole = own.pop("whole", {})
    fitted = {part: fitting(kind, tiny[part]) | own.pop(part, {}) for part, kind in parts.items()}
    return cls.config_class(**fitted | dict(text_config=fitted["text_config"] | own), **whole)


@cache
def saved(name: str, original: bool = True) -> tuple[Any, Path]:
    """A model and the directory that Transformers writes from it, once for all tests: neither is to be changed.

    original: as published, not as in memory. name: of `MODELS` here, or of `hf.MODELS`.
    """
    path = Path(_FOLDER.name) / f"{name}-{original}"
    model = hf.build(name) if name in hf.MODELS else build(name)
    model.save_pretrained(path, save_original_format=original)
    return model, path


def fitting(kind: type | str, values: Config) -> Config:
    """The values that a config class has fields for."""
    kind = getattr(transformers, kind) if isinstance(kind, str) else kind
    known = {*inspect.signature(kind.__init__).parameters, *dir(kind)}
    return {name: value for name, value in values.items() if name in known}
