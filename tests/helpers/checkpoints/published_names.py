"""Families that Transformers has no class for, or none that is small: published names and axes.

In reference-behaviour's and the checkpoints' own words. Gate and up, then down; the native prefix of both.
"""

PER_EXPERT = ("{e}.{g=gate_proj|up_proj}.weight [i d]", "{e}.down_proj.weight [d i]")
W123 = ("{e}.{g=w1|w3}.weight [i d]", "{e}.w2.weight [d i]")
STACKED = ("gate_up_proj [e (g i) d]", "down_proj [e d i]")
TRANSPOSED = ("gate_up_proj [e d (g i)]", "down_proj [e i d]")
STEP = ("{g=gate_proj|up_proj}.weight [e i d]", "down_proj.weight [e d i]")
PUBLISHED: dict[str, tuple[str, tuple[str, str], str]] = {
    "aria": ("language_model.model.layers.1.mlp.experts.", ("fc1.weight [e d (g i)]", "fc2.weight [e i d]"), ""),
    "bailing_moe": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "bailing_moe_v2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "deepseek_ocr2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "deepseek_v41": ("layers.1.ffn.experts.", W123, ""),
    "deepseek_v41_text": ("layers.1.ffn.experts.", W123, ""),
    "diffusion_gemma": ("model.decoder.layers.1.experts.", STACKED, "model.decoder.layers.1.moe.experts."),
    "gemma4": ("model.language_model.layers.1.experts.", STACKED, "model.language_model.layers.1.moe.experts."),
    "hy_mt2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "hy_v4_vl": ("model.language_model.layers.1.mlp.experts.", STACKED, ""),
    "hy_v4_vl_text": ("model.layers.1.mlp.experts.", STACKED, ""),
    "inkling2": ("model.llm.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "inkling2_loop": ("model.llm.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "inkling2_loop_text": ("model.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "inkling_mm_model": ("model.llm.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "kimi_k25": ("language_model.model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "kimi_k3": (
        "language_model.model.layers.1.block_sparse_moe.experts.", W123, "language_model.model.layers.1.mlp.experts."
    ),
    "lara_mini": ("model.layers.1.mlp.experts.", STACKED, ""),
    "llama4": ("language_model.model.layers.1.feed_forward.experts.", TRANSPOSED, ""),
    "mimo_v2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "minimax_m3_vl": (
        "language_model.model.layers.1.block_sparse_moe.experts.", W123, "language_model.model.layers.1.mlp.experts."
    ),
    "mistral_large4": ("layers.1.experts.", W123, "layers.1.mlp.experts."),
    "muse_spark": ("model.language_model.layers.1.mlp.experts.", STACKED, ""),
    "nemo_speechlm": (
        "llm.model.layers.1.mixer.experts.", ("gate_and_up_projs [e d i]", "down_projs [e i d]"), ""
    ),
    "nemotron_h_omni": (
        "language_model.model.layers.1.mixer.experts.",
        ("{e}.up_proj.weight [i d]", "{e}.down_proj.weight [d i]"),
        "",
    ),
    "qwen3_8_flash_next": ("model.language_model.layers.1.mlp.experts.", STACKED, ""),
    "qwen3_8_flash_next_text": ("model.layers.1.mlp.experts.", STACKED, ""),
    "qwen3_omni_moe": ("thinker.model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "qwen3_vl_moe": ("model.language_model.layers.1.mlp.experts.", TRANSPOSED, ""),
    "sarvam_mla": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "sarvam_moe": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "step3p7": ("model.layers.1.moe.", STEP, "model.layers.1.moe.experts."),
    "unlimited_ocr": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
}  # fmt: skip
