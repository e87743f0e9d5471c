"""Checkpoints that Transformers does not write, seeded: published layouts as tables of key templates over config sizes.

    config, tensors = qwen3_5_moe_fp8(scale=torch.bfloat16)     # Hugging Face's own field names; HF keys, complete
    for name, make in CHECKPOINTS.items(): config, tensors = make()

A template's `{a|b}` is a choice and `{moe}` a set of indices; sizes follow, and the dtype where it is not bf16.
Sizes that are no multiple of 128 leave ragged FP8 blocks, and magnitudes differ from block to block, so that every
scale matters. The same seed gives the same weights in every layout of a family (FP8: up to rounding).
Key counts of the DeepSeek-V3 and Qwen3.5 tables were compared with the published checkpoints: 91,991 and 64,196.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from synthetic_tables import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_CONFIG,
    DEEPSEEK_V3_TINY,
    FP8_CONFIG,
    QWEN3_5,
    QWEN3_5_BLOCK,
    QWEN3_5_CONFIG,
    QWEN3_5_MTP,
    STEP3P5,
    STEP3P5_CONFIG,
    Config,
    Spec,
    Specs,
)
from torch import Tensor
from torch.nn import functional as F


class Checkpoint(NamedTuple):
    config: Config
    tensors: dict[str, Tensor]


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
