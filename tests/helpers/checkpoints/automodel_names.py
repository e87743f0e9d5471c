"""The names that Automodel's loader looks up, of twelve families: published names, written down by hand."""

import torch

E, D, I = 4, 6, 5
GATED = ("gate", "up", "down")
DRAWN = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=DRAWN)


def experts(at, words=("gate_proj", "up_proj", "down_proj")):
    shapes = ((I, D), (I, D), (D, I))
    return {f"{at}{e}.{w}.weight": drawn(*s) for e in range(E) for w, s in zip(words, shapes, strict=True)}


def fused(at, up="gate_up_proj", down="down_proj"):
    return {at + up: drawn(E, 2 * I, D), at + down: drawn(E, D, I)}


W123 = ("w1", "w3", "w2")
SIZES = dict(num_hidden_layers=2, hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=2)
LING = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=3, use_qkv_bias=True)

# model type -> (config, Hugging Face's experts, other tensors and Automodel's names for them, where experts are)
QKV, M3 = "model.layers.0.attention.query_key_value", "language_model.model.layers.1.block_sparse_moe.experts."
ROWS = {
    "qwen3_omni_moe": (
        dict(thinker_config=dict(text_config=SIZES)),
        experts("thinker.model.layers.1.mlp.experts."),
        """
        thinker.model.norm.weight model.norm.weight
        thinker.lm_head.weight lm_head.weight
        thinker.visual.x visual.x
        thinker.audio_tower.y audio_tower.y
        thinker.model.layers.1.mlp.gate.weight model.layers.1.mlp.gate.weight
        """,
        "model.layers.1.mlp.experts.",
    ),
    "bailing_moe_v2": (
        SIZES | LING,
        experts("model.layers.1.mlp.experts.") | {f"{QKV}.weight": drawn(12, D), f"{QKV}.bias": drawn(12)},
        """
        model.word_embeddings.weight model.embed_tokens.weight
        model.norm.weight model.norm.weight
        lm_head.weight lm_head.weight
        model.layers.0.attention.dense.weight model.layers.0.self_attn.o_proj.weight
        model.layers.0.attention.query_layernorm.weight model.layers.0.self_attn.q_norm.weight
        model.layers.0.attention.key_layernorm.weight model.layers.0.self_attn.k_norm.weight
        model.layers.1.mlp.gate.expert_bias model.layers.1.mlp.gate.e_score_correction_bias
        """,
        "model.layers.1.mlp.experts.",
    ),
    "kimi_linear": (
        SIZES,
        experts("model.layers.1.block_sparse_moe.experts.", W123),
        """
        model.layers.0.self_attn.A_log model.layers.0.self_attn._fp32_params.A_log
        model.layers.0.self_attn.dt_bias model.layers.0.self_attn._fp32_params.dt_bias
        model.layers.0.self_attn.q_proj.weight model.layers.0.self_attn.q_proj.weight
        model.layers.1.block_sparse_moe.gate.weight model.layers.1.mlp.gate.weight
        model.layers.1.block_sparse_moe.shared_experts.up_proj.weight model.layers.1.mlp.shared_experts.up_proj.weight
        """,
        "model.layers.1.mlp.experts.",
    ),
    "kimi_k3": (
        dict(text_config=SIZES),
        experts(M3, W123),
        """
        language_model.model.layers.0.self_attn.A_log model.layers.0.self_attn._fp32_params.A_log
        language_model.lm_head.weight lm_head.weight
        vision_tower.x vision_tower.x
        language_model.model.layers.1.block_sparse_moe.routed_expert_norm.weight
            model.layers.1.mlp.routed_expert_norm.weight
        """,
        "model.layers.1.mlp.experts.",
    ),
    "kimi_k25": (
        dict(text_config=SIZES | dict(n_routed_experts=E)),
        experts("language_model.model.layers.1.mlp.experts."),
        """
        language_model.model.norm.weight model.language_model.model.norm.weight
        language_model.lm_head.weight model.language_model.lm_head.weight
        vision_tower.x vision_tower.x
        mm_projector.proj.0.weight multi_modal_projector.linear_1.weight
        mm_projector.proj.2.bias multi_modal_projector.linear_2.bias
        """,
        "model.language_model.model.layers.1.mlp.experts.",
    ),
    "mistral4": (
        SIZES | dict(n_routed_experts=E),
        fused("language_model.model.layers.1.mlp.experts."),
        """
        language_model.model.norm.weight model.norm.weight
        language_model.lm_head.weight lm_head.weight
        language_model.model.layers.1.mlp.gate.weight model.layers.1.mlp.gate.weight
        """,
        "model.layers.1.mlp.experts.",
    ),
    "mistral4 with towers": (
        dict(text_config=SIZES | dict(n_routed_experts=E)),
        fused("language_model.model.layers.1.mlp.experts."),
        """
        language_model.model.norm.weight model.language_model.model.norm.weight
        language_model.lm_head.weight model.language_model.lm_head.weight
        vision_tower.x model.vision_tower.x
        multi_modal_projector.y model.multi_modal_projector.y
        """,
        "model.language_model.model.layers.1.mlp.experts.",
    ),
    "inkling_mm_model": (
        dict(text_config=SIZES | dict(n_routed_experts=E)),
        fused("model.llm.layers.1.mlp.experts.", "w13_weight", "w2_weight"),
        """
        model.llm.norm.weight model.language_model.norm.weight
        model.llm.layers.1.mlp.gate.bias model.language_model.layers.1.mlp.gate._fp32_params.e_score_correction_bias
        model.visual.x model.visual.x
        """,
        "model.language_model.layers.1.mlp.experts.",
    ),
    "step3p7": (
        SIZES | dict(moe_num_experts=E),
        {f"model.layers.1.moe.{p}_proj.weight": drawn(E, *((D, I) if p == "down" else (I, D))) for p in GATED},
        """
        model.embed_tokens.weight model.language_model.embed_tokens.weight
        model.norm.weight model.language_model.norm.weight
        lm_head.weight lm_head.weight
        vision_model.x model.vision_model.x
        vit_large_projector.weight model.vit_large_projector.weight
        model.layers.1.moe.router_bias model.language_model.layers.1.moe.gate.e_score_correction_bias
        model.layers.2.enorm.weight mtp.layers.0.enorm.weight
        model.layers.0.input_layernorm.weight model.language_model.layers.0.input_layernorm.weight
        """,
        "model.language_model.layers.1.moe.experts.",
    ),
    "minimax_m3_vl": (
        dict(text_config=SIZES | dict(num_local_experts=E)),
        experts(M3, W123),
        """
        language_model.model.norm.weight model.norm.weight
        language_model.lm_head.weight lm_head.weight
        vision_tower.x vision_tower.x
        multi_modal_projector.y vision_tower.multi_modal_projector.y
        patch_merge_mlp.z vision_tower.patch_merge_mlp.z
        language_model.model.layers.0.self_attn.index_q_proj.weight
            model.layers.0.self_attn.indexer.index_q_proj.weight
        language_model.model.layers.1.block_sparse_moe.shared_experts.up_proj.weight
            model.layers.1.shared_experts.up_proj.weight
        """,
        "model.layers.1.mlp.experts.",
    ),
    "gemma4": (
        dict(text_config=SIZES),
        fused("model.language_model.layers.1.experts.")
        | {"model.language_model.layers.1.router.per_expert_scale": drawn(E)},
        """
        model.language_model.layers.1.router.scale model.language_model.layers.1.moe.gate.scale
        model.language_model.norm.weight model.language_model.norm.weight
        """,
        "model.language_model.layers.1.moe.experts.",
    ),
    "deepseek_v4": (
        SIZES | dict(n_routed_experts=E),
        experts("layers.1.ffn.experts.", W123),
        """
        embed.weight model.embed_tokens.weight
        norm.weight model.norm.weight
        head.weight lm_head.weight
        hc_head_fn model.hc_head.hc_fn
        layers.0.attn_norm.weight model.layers.0.input_layernorm.weight
        layers.0.ffn_norm.weight model.layers.0.post_attention_layernorm.weight
        layers.0.hc_attn_base model.layers.0.attn_hc.base
        layers.0.attn.attn_sink model.layers.0.self_attn.sinks_param.weight
        layers.0.attn.kv_norm.weight model.layers.0.self_attn.kv_norm.weight
        layers.0.attn.compressor.wgate.weight model.layers.0.self_attn.compressor.wgate.weight
        layers.0.attn.compressor.norm.weight model.layers.0.self_attn.compressor.kv_norm.weight
        layers.0.attn.compressor.ape model.layers.0.self_attn.compressor.ape_param.weight
        layers.0.attn.indexer.wq_b.weight model.layers.0.self_attn.compressor.indexer.wq_b.weight
        layers.0.attn.indexer.weights_proj.weight model.layers.0.self_attn.compressor.indexer.weights_proj.weight
        layers.0.attn.indexer.compressor.wkv.weight model.layers.0.self_attn.compressor.indexer.wkv.weight
        layers.0.attn.indexer.compressor.norm.weight model.layers.0.self_attn.compressor.indexer.kv_norm.weight
        layers.0.attn.indexer.compressor.ape model.layers.0.self_attn.compressor.indexer.ape_param.weight
        layers.0.ffn.gate.tid2eid model.layers.0.mlp.gate.tid2eid
        layers.1.ffn.gate.bias model.layers.1.mlp.gate.e_score_correction_bias
        layers.1.ffn.shared_experts.w2.weight model.layers.1.mlp.shared_experts.down_proj.weight
        mtp.0.e_proj.weight mtp.layers.0.e_proj.weight
        mtp.0.attn.wo_a.weight mtp.layers.0.self_attn.wo_a.weight
        mtp.0.ffn.gate.bias mtp.layers.0.mlp.gate.e_score_correction_bias
        mtp.0.hc_head_scale mtp.layers.0.hc_head.hc_scale
        mtp.0.norm.weight mtp.layers.0.norm.weight
        """,
        "model.layers.1.mlp.experts.",
    ),
    "deepseek_v41": (
        dict(text_config=SIZES | dict(n_routed_experts=E)),
        experts("layers.1.ffn.experts.", W123),
        """
        embed.weight model.embed_tokens.weight
        norm.weight model.norm.weight
        head.weight lm_head.weight
        image_start model.image_start
        vision.blocks.0.attn.wqkv.bias model.vision.blocks.0.attn.wqkv.bias
        aligner.w1.weight model.aligner.w1.weight
        layers.0.attn.wq_a.weight model.layers.0.attn.wq_a.weight
        layers.0.attn.attn_sink model.layers.0.attn.sinks_param.weight
        layers.0.hc_ffn_scale model.layers.0.ffn_hc.scale
        layers.1.engram.embed.weight model.layers.1.engram.embed.weight
        layers.1.ffn.gate.weight model.layers.1.ffn.gate.weight
        layers.1.ffn.gate.bias model.layers.1.ffn.gate.e_score_correction_bias
        layers.1.ffn.gate.bias_vl model.layers.1.ffn.gate.bias_vl
        layers.1.ffn.shared_experts.w3.weight model.layers.1.ffn.shared_experts.up_proj.weight
        mtp.0.main_proj.weight mtp.0.main_proj.weight
        mtp.0.hc_attn_fn mtp.0.attn_hc.fn
        mtp.0.ffn.gate.bias mtp.0.ffn.gate.e_score_correction_bias
        """,
        "model.layers.1.ffn.experts.",
    ),
}
