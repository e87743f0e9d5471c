"""Published names, axes and sizes of the checkpoints that `hf_synthetic` writes: data alone."""

import json
from typing import Any, NamedTuple

import torch

Config = dict[str, Any]


class Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


Specs = dict[str, Spec]


STEP3P5 = """
model.embed_tokens.weight                                  V H
model.norm.weight                                          H
lm_head.weight                                             V H
model.layers.{all}.{input|post_attention}_layernorm.weight H
model.layers.{all}.self_attn.{q|k}_norm.weight             A
model.layers.{all}.self_attn.{k|v}_proj.weight             KV*A H
model.layers.{full}.self_attn.q_proj.weight                Q*A H
model.layers.{full}.self_attn.o_proj.weight                H Q*A
model.layers.{full}.self_attn.g_proj.weight                Q H
model.layers.{sliding}.self_attn.q_proj.weight             S*A H
model.layers.{sliding}.self_attn.o_proj.weight             H S*A
model.layers.{sliding}.self_attn.g_proj.weight             S H
model.layers.{dense}.mlp.{gate|up}_proj.weight             M H
model.layers.{dense}.mlp.down_proj.weight                  H M
model.layers.{moe}.moe.gate.weight                         E H
model.layers.{moe}.moe.router_bias                         E f32
model.layers.{moe}.moe.{gate|up}_proj.weight               E I H
model.layers.{moe}.moe.down_proj.weight                    E H I
model.layers.{moe}.share_expert.{gate|up}_proj.weight      P H
model.layers.{moe}.share_expert.down_proj.weight           H P
model.layers.{mtp}.{e|h}norm.weight                        H
model.layers.{mtp}.eh_proj.weight                          H 2*H
model.layers.{mtp}.transformer.shared_head.norm.weight     H
model.layers.{mtp}.transformer.shared_head.output.weight   V H
"""

DEEPSEEK_V3 = """
model.embed_tokens.weight                                  V H
model.norm.weight                                          H
lm_head.weight                                             V H
model.layers.{all}.{input|post_attention}_layernorm.weight H
model.layers.{all}.self_attn.q_a_proj.weight               QL H
model.layers.{all}.self_attn.q_a_layernorm.weight          QL
model.layers.{all}.self_attn.q_b_proj.weight               Q*QK QL
model.layers.{all}.self_attn.kv_a_proj_with_mqa.weight     KVA H
model.layers.{all}.self_attn.kv_a_layernorm.weight         KVL
model.layers.{all}.self_attn.kv_b_proj.weight              Q*KVB KVL
model.layers.{all}.self_attn.o_proj.weight                 H Q*VH
model.layers.{dense}.mlp.{gate|up}_proj.weight             M H
model.layers.{dense}.mlp.down_proj.weight                  H M
model.layers.{moe}.mlp.gate.weight                         E H
model.layers.{moe}.mlp.gate.e_score_correction_bias        E f32
model.layers.{moe}.mlp.experts.{e}.{gate|up}_proj.weight   I H
model.layers.{moe}.mlp.experts.{e}.down_proj.weight        H I
model.layers.{moe}.mlp.shared_experts.{gate|up}_proj.weight P H
model.layers.{moe}.mlp.shared_experts.down_proj.weight     H P
model.layers.{mtp}.embed_tokens.weight                     V H
model.layers.{mtp}.{e|h}norm.weight                        H
model.layers.{mtp}.eh_proj.weight                          H 2*H
model.layers.{mtp}.shared_head.norm.weight                 H
model.layers.{mtp}.shared_head.head.weight                 V H
"""

QWEN3_5_BLOCK = """
{pre}.{l}.{input|post_attention}_layernorm.weight          H
{pre}.{l}.mlp.gate.weight                                  E H
{pre}.{l}.mlp.experts.{e}.{gate|up}_proj.weight            I H
{pre}.{l}.mlp.experts.{e}.down_proj.weight                 H I
{pre}.{l}.mlp.shared_expert.{gate|up}_proj.weight          P H
{pre}.{l}.mlp.shared_expert.down_proj.weight               H P
{pre}.{l}.mlp.shared_expert_gate.weight                    1 H
{pre}.{full}.self_attn.q_proj.weight                       2*Q*A H
{pre}.{full}.self_attn.{k|v}_proj.weight                   KV*A H
{pre}.{full}.self_attn.o_proj.weight                       H Q*A
{pre}.{full}.self_attn.{q|k}_norm.weight                   A
{pre}.{linear}.linear_attn.A_log                           LV
{pre}.{linear}.linear_attn.dt_bias                         LV
{pre}.{linear}.linear_attn.norm.weight                     LVD
{pre}.{linear}.linear_attn.conv1d.weight                   QKV 1 4
{pre}.{linear}.linear_attn.in_proj_{a|b}.weight            LV H
{pre}.{linear}.linear_attn.in_proj_qkv.weight              QKV H
{pre}.{linear}.linear_attn.in_proj_z.weight                LV*LVD H
{pre}.{linear}.linear_attn.out_proj.weight                 H LV*LVD
"""

QWEN3_5 = """
model.language_model.embed_tokens.weight                   V H
model.language_model.norm.weight                           H
lm_head.weight                                             V H
model.visual.patch_embed.proj.weight                       VH 3 2 4 4
model.visual.patch_embed.proj.bias                         VH
model.visual.pos_embed.weight                              VP VH
model.visual.blocks.{v}.norm{1|2}.{weight|bias}            VH
model.visual.blocks.{v}.attn.qkv.weight                    3*VH VH
model.visual.blocks.{v}.attn.qkv.bias                      3*VH
model.visual.blocks.{v}.attn.proj.weight                   VH VH
model.visual.blocks.{v}.attn.proj.bias                     VH
model.visual.blocks.{v}.mlp.linear_fc1.weight              VM VH
model.visual.blocks.{v}.mlp.linear_fc1.bias                VM
model.visual.blocks.{v}.mlp.linear_fc2.weight              VH VM
model.visual.blocks.{v}.mlp.linear_fc2.bias                VH
model.visual.merger.norm.{weight|bias}                     VH
model.visual.merger.linear_fc1.weight                      4*VH 4*VH
model.visual.merger.linear_fc1.bias                        4*VH
model.visual.merger.linear_fc2.weight                      H 4*VH
model.visual.merger.linear_fc2.bias                        H
"""

QWEN3_5_MTP = """
mtp.fc.weight                                              H 2*H
mtp.norm.weight                                            H
mtp.pre_fc_norm_{embedding|hidden}.weight                  H
"""

STEP3P5_CONFIG: Config = json.loads("""{
"model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], "torch_dtype": "bfloat16",
"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_nextn_predict_layers": 1,
"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
"num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 12, "use_head_wise_attn_gate": true,
"attention_other_setting": {
    "attention_type": "sliding_attention", "num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 12},
"use_moe": true, "moe_layers_enum": "2,3", "moe_num_experts": 8, "moe_top_k": 2, "moe_intermediate_size": 24,
"share_expert_dim": 20, "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 3.0,
"use_moe_router_bias": true, "norm_expert_weight": true, "need_fp32_gate": true,
"swiglu_limits": [0.0, 0.0, 0.0, 1.25, 0.0], "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.5, 0.0]}""")

DEEPSEEK_V3_CONFIG: Config = json.loads("""{
"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16",
"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
"num_hidden_layers": 61, "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1,
"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu",
"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5}""")

DEEPSEEK_V3_TINY: Config = json.loads("""{
"vocab_size": 64, "hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 144, "num_hidden_layers": 3,
"first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 132,
"qk_nope_head_dim": 40, "qk_rope_head_dim": 8, "v_head_dim": 36,
"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}""")

QWEN3_5_CONFIG: Config = json.loads("""{
"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "tie_word_embeddings": false,
"text_config": {
    "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "vocab_size": 64, "hidden_size": 160, "hidden_act": "silu",
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "mtp_num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 36, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 24, "linear_value_head_dim": 20, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "moe_intermediate_size": 144, "shared_expert_intermediate_size": 136, "num_experts": 6, "num_experts_per_tok": 2},
"vision_config": {
    "model_type": "qwen3_5_moe_vision", "depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2,
    "patch_size": 4, "out_hidden_size": 160, "num_position_embeddings": 25}}""")

FP8_CONFIG: Config = json.loads("""{
"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}""")
