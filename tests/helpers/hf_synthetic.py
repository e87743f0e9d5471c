"""Checkpoints that Transformers does not write, seeded: published layouts as tables of key templates over config sizes.

    config, tensors = qwen3_5_moe_fp8(scale=torch.bfloat16)     # Hugging Face's own field names; HF keys, complete
    for name, make in CHECKPOINTS.items(): config, tensors = make()

A template's `{a|b}` is a choice and `{moe}` a set of indices; sizes follow, and the dtype where it is not bf16.
Sizes that are no multiple of 128 leave ragged FP8 blocks, and magnitudes differ from block to block, so that every
scale matters. The same seed gives the same weights in every layout of a family (FP8: up to rounding).
Key counts of the DeepSeek-V3 and Qwen3.5 tables were compared with the published checkpoints: 91,991 and 64,196.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Config = dict[str, Any]


class Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


Specs = dict[str, Spec]


class Checkpoint(NamedTuple):
    config: Config
    tensors: dict[str, Tensor]


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

# Which matrices an FP8 checkpoint quantises. The published Qwen3.5 ones do QWEN3_5_ALL, with bf16 scales.
DEEPSEEK_V3_FP8 = r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$"
QWEN3_5_EXPERTS = r"\.experts\.\d+\.\w+_proj\.weight$"
QWEN3_5_ALL = (
    rf"{QWEN3_5_EXPERTS}|\.(self_attn|shared_expert)\.\w+_proj\.|\.linear_attn\.(in_proj_qkv|in_proj_z|out_proj)\."
)
QWEN3_5_FP32 = ("A_log", "linear_attn.norm.weight")


def step3p5(seed: int = 0, **overrides: Any) -> Checkpoint:
    """Step-3.5-Flash: dense layers, MoE layers with 3-D experts and an fp32 `router_bias`, a dense MTP layer."""
    config = STEP3P5_CONFIG | overrides
    return Checkpoint(config, fill(step3p5_specs(config), seed))


def deepseek_v3(seed: int = 0, **overrides: Any) -> Checkpoint:
    """DeepSeek-V3 in bf16; layer `num_hidden_layers` is the MTP layer (none with num_nextn_predict_layers=0)."""
    config = DEEPSEEK_V3_CONFIG | DEEPSEEK_V3_TINY | overrides
    return Checkpoint(config, fill(deepseek_v3_specs(config), seed))


def deepseek_v3_fp8(scale: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Checkpoint:
    """`deepseek_v3` with every projection of attention, MLPs and experts in FP8, MTP included."""
    config, tensors = deepseek_v3(seed, **overrides)
    return Checkpoint(config | {"quantization_config": FP8_CONFIG}, quantise(tensors, DEEPSEEK_V3_FP8, scale))


def deepseek_v3_keys(**overrides: Any) -> dict[str, Spec]:
    """Names, shapes and dtypes of the real DeepSeek-V3 in bf16, MTP layer included: 46,183 of them."""
    return deepseek_v3_specs(DEEPSEEK_V3_CONFIG | overrides)


def qwen3_5_moe(
    mtp: str | None = "fused", fp32: tuple[str, ...] = QWEN3_5_FP32, seed: int = 0, **overrides: Any
) -> Checkpoint:
    """Qwen3.5-MoE as published, decoder experts fused; MTP experts "fused", "split", or no MTP (None).

    `fp32` ends the names of what is not bf16: the default is Qwen3.5's choice, () is Qwen3.6's.
    """
    config = qwen3_5_config(mtp is not None, **overrides)
    tensors = fuse(fill(qwen3_5_specs(config, fp32), seed), "model.")
    return Checkpoint(config, fuse(tensors, "mtp.") if mtp == "fused" else tensors)


def qwen3_5_moe_fp8(
    scale: torch.dtype = torch.float32, only: str = QWEN3_5_EXPERTS, mtp: bool = True, seed: int = 0, **overrides: Any
) -> Checkpoint:
    """Qwen3.5-MoE with split experts in FP8, in the decoder and in MTP; `only` says which matrices are in FP8."""
    config = qwen3_5_config(mtp, **overrides) | {"quantization_config": FP8_CONFIG}
    return Checkpoint(config, quantise(fill(qwen3_5_specs(config, QWEN3_5_FP32), seed), only, scale))


CHECKPOINTS: dict[str, Callable[..., Checkpoint]] = {
    "step3p5": step3p5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_split_mtp": partial(qwen3_5_moe, mtp="split"),
    "qwen3_5_moe_no_mtp": partial(qwen3_5_moe, mtp=None),
    "qwen3_5_moe_fp8": qwen3_5_moe_fp8,
    "qwen3_5_moe_fp8_bf16_scales": partial(qwen3_5_moe_fp8, scale=torch.bfloat16),
    "qwen3_5_moe_fp8_published": partial(qwen3_5_moe_fp8, scale=torch.bfloat16, only=QWEN3_5_ALL),
    "deepseek_v3": deepseek_v3,
    "deepseek_v3_no_mtp": partial(deepseek_v3, num_nextn_predict_layers=0),
    "deepseek_v3_fp8": deepseek_v3_fp8,
}


def step3p5_specs(c: Config) -> Specs:
    fields = "V=vocab_size H=hidden_size A=head_dim Q=num_attention_heads KV=num_attention_groups M=intermediate_size"
    sizes = named(f"{fields} I=moe_intermediate_size P=share_expert_dim E=moe_num_experts", c)
    sizes["S"] = c["attention_other_setting"]["num_attention_heads"]
    layers = range(c["num_hidden_layers"] + c["num_nextn_predict_layers"])
    moe = [int(l) for l in c["moe_layers_enum"].split(",")]
    full = [l for l in layers if c["layer_types"][l] == "full_attention"]
    kinds = dict(full=full, sliding=sorted({*layers} - {*full}), moe=moe, dense=sorted({*layers} - {*moe}))
    return expand(STEP3P5, sizes, all=layers, mtp=layers[c["num_hidden_layers"] :], **kinds)


def deepseek_v3_specs(c: Config) -> Specs:
    fields = "V=vocab_size H=hidden_size M=intermediate_size I=moe_intermediate_size E=n_routed_experts"
    sizes = named(f"{fields} Q=num_attention_heads QL=q_lora_rank KVL=kv_lora_rank VH=v_head_dim", c)
    nope, rope = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    sizes |= dict(QK=nope + rope, KVA=sizes["KVL"] + rope, KVB=nope + sizes["VH"], P=sizes["I"] * c["n_shared_experts"])
    dense, end = c["first_k_dense_replace"], c["num_hidden_layers"]
    layers = range(end + c["num_nextn_predict_layers"])
    kinds = dict(dense=layers[:dense], moe=layers[dense:], mtp=layers[end:], e=range(sizes["E"]))
    return expand(DEEPSEEK_V3, sizes, all=layers, **kinds)


def qwen3_5_config(mtp: bool, **overrides: Any) -> Config:
    text = QWEN3_5_CONFIG["text_config"] | {"mtp_num_hidden_layers": int(mtp)} | overrides
    return QWEN3_5_CONFIG | {"text_config": text}


def qwen3_5_specs(config: Config, fp32: tuple[str, ...]) -> Specs:
    c, vision = config["text_config"], config["vision_config"]
    fields = "V=vocab_size H=hidden_size A=head_dim Q=num_attention_heads KV=num_key_value_heads E=num_experts"
    fields += (
        " I=moe_intermediate_size P=shared_expert_intermediate_size LV=linear_num_value_heads LVD=linear_value_head_dim"
    )
    sizes = named(fields, c) | named("VH=hidden_size VM=intermediate_size VP=num_position_embeddings", vision)
    sizes["QKV"] = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + sizes["LV"] * sizes["LVD"]
    layers, mtp = range(c["num_hidden_layers"]), range(c["mtp_num_hidden_layers"])
    full = [l for l in layers if c["layer_types"][l] == "full_attention"]
    kinds = dict(l=layers, full=full, linear=sorted({*layers} - {*full}), e=range(sizes["E"]))
    specs = expand(QWEN3_5, sizes, v=range(vision["depth"]))
    specs |= expand(QWEN3_5_BLOCK, sizes, pre=["model.language_model.layers"], **kinds)
    if mtp:
        specs |= expand(QWEN3_5_MTP, sizes)
        specs |= expand(QWEN3_5_BLOCK, sizes, pre=["mtp.layers"], l=mtp, full=mtp, linear=[], e=kinds["e"])
    return {name: Spec(s.shape, torch.float32 if name.endswith(fp32) else s.dtype) for name, s in specs.items()}


def named(fields: str, config: Config) -> dict[str, int]:
    """Sizes by letter: "V=vocab_size H=hidden_size" of a config."""
    return {letter: config[field] for letter, field in (pair.split("=") for pair in fields.split())}


def expand(table: str, sizes: dict[str, int], **sets: Iterable[Any]) -> Specs:
    """Every key of a table: one per choice of its placeholders."""
    specs: Specs = {}
    for line in table.strip().splitlines():
        template, *shape = line.split()
        dtype = torch.float32 if shape[-1] == "f32" else torch.bfloat16
        dims = [math.prod(int(sizes.get(s, s)) for s in d.split("*")) for d in shape if d != "f32"]
        specs |= dict.fromkeys(names(template, sets), Spec(tuple(dims), dtype))
    return specs


def names(template: str, sets: dict[str, Iterable[Any]]) -> Iterator[str]:
    choices = [p.split("|") if "|" in p else sets[p] for p in re.findall(r"{(.+?)}", template)]
    slots = re.sub(r"{.+?}", "{}", template)
    return (slots.format(*choice) for choice in product(*choices))


def fill(specs: Specs, seed: int) -> dict[str, Tensor]:
    """Normal noise; in matrices, each 128 x 128 block has a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in specs.items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            x *= spread(torch.rand([-(-n // 128) for n in shape], generator=generator) + 0.05, shape)
        tensors[name] = (0.2 * x).to(dtype)
    return tensors


def spread(scale: Tensor, shape: Iterable[int]) -> Tensor:
    """One value per 128 x 128 block, at every element of a matrix of that shape."""
    rows, cols = shape
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]


def quantise(tensors: dict[str, Tensor], only: str, scale: torch.dtype) -> dict[str, Tensor]:
    """Matrices whose name matches become e4m3, each beside a `_scale_inv` of one value per block (amax / 448)."""
    out = {}
    for name, w in tensors.items():
        if not re.search(only, name):
            out[name] = w
            continue
        padded = F.pad(w.float(), (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))
        amax = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3))
        inv = (amax / 448).to(scale)
        out[name] = (w.float() / spread(inv.float(), w.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = inv
    return out


def fuse(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Stack split experts as Qwen does: `gate_up_proj` [E, 2I, H], gate rows above up, and `down_proj` [E, H, I]."""
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[str, list[Tensor]]] = {}
    for name, w in tensors.items():
        m = re.fullmatch(r"(.+\.experts)\.\d+\.(gate|up|down)_proj\.weight", name)
        if m and name.startswith(prefix):
            experts.setdefault(m[1], {}).setdefault(m[2], []).append(w)
        else:
            out[name] = w
    for name, parts in experts.items():
        gate, up, down = (torch.stack(parts[p]) for p in ("gate", "up", "down"))
        out |= {f"{name}.gate_up_proj": torch.cat([gate, up], 1), f"{name}.down_proj": down}
    return out
