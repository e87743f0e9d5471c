"""Tiny configurations of whole multimodal models: a text model of `hf_zoo`, and what stands beside it.

Of Transformers 5.24, not here: Kimi-K2.5, whose text layers it saves as `blocks`; Inkling, which needs SciPy;
DiffusionGemma, whose decoder is its encoder.
"""

from typing import Any

Config = dict[str, Any]

NARROW = dict(intermediate_size=24)
LATENT = dict(num_key_value_heads=4)
TOWER: Config = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
PATCHES = dict(image_size=16, patch_size=4)
SAM: Config = dict(hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64)
SAM |= dict(mlp_dim=20, window_size=2, global_attn_indexes=[0], downsample_channels=[8, 16])
OCR = dict(mlp_layer_types=["sparse", "sparse"], n_group=None, topk_group=None)
LOOP: Config = dict(unpadded_vocab_size=61, vision_config=TOWER | dict(text_hidden_size=32, projection_hidden_dim=16))
GEMMA: Config = dict(top_k_experts=2, hidden_size_per_layer_input=0, num_kv_shared_layers=0)

MODELS: dict[str, tuple[str, Config]] = {
    "aria": (
        "AriaForConditionalGeneration",
        NARROW
        | dict(moe_num_experts=8, moe_num_shared_experts=2)
        | dict(vision_config=TOWER | PATCHES | dict(model_type="idefics3_vision")),
    ),
    "deepseek_ocr2": (
        "DeepseekOcr2ForConditionalGeneration",
        OCR
        | dict(vision_config=dict(sam_config=SAM, encoder_config=TOWER | dict(num_key_value_heads=2, vocab_size=61))),
    ),
    "gemma4": ("Gemma4ForConditionalGeneration", GEMMA | dict(enable_moe_block=True)),
    "inkling2": ("Inkling2ForConditionalGeneration", LOOP),
    "llama4": (
        "Llama4ForConditionalGeneration",
        NARROW
        | dict(intermediate_size_mlp=40)
        | dict(vision_config=dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)),
    ),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", NARROW | dict(swiglu_limit=0.5)),
    "mistral_large4": (
        "MistralLarge4ForConditionalGeneration",
        LATENT
        | dict(index_n_heads=2, index_head_dim=8)
        | dict(vision_config=TOWER | PATCHES | dict(model_type="pixtral", head_dim=8)),
    ),
    "muse_spark": (
        "MuseSparkForConditionalGeneration",
        dict(moe_hidden_size=28, whole=dict(out_hidden_size=32, projector_hidden_size=20))
        | dict(vision_config=TOWER | dict(patch_size=4, pos_emb_height=4, pos_emb_width=4))
        | dict(
            audio_config=dict(
                num_hidden_layers=3,
                patch_sizes=[4, 3, 5],
                hidden_sizes=[16, 24, 20],
                depths=[1, 1, 1],
                out_hidden_size=32,
            )
        ),
    ),
    "step3p7": ("Step3p7ForConditionalGeneration", dict(mlp_layer_types=["dense", "sparse"], sliding_window=8)),
    "unlimited_ocr": (
        "UnlimitedOcrForConditionalGeneration",
        OCR | dict(vision_config=dict(sam_config=SAM, encoder_config=TOWER | PATCHES)),
    ),
}
