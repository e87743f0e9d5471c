"""In the process of `automodel_loader.py`: Automodel's own adapters of DeepSeek-V4, V4.1 and its draft beside ours.

The names are those of a tiny checkpoint, as published. V4.1 also quantised: experts FP4 in int8, attention and shared
experts FP8 in blocks of 32, the table of engrams FP8 in groups of 32, under e8m0 scales.
"""

from typing import Any

import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.deepseek_v4.config import DeepseekV4Config
from nemo_automodel.components.models.deepseek_v4.state_dict_adapter import DeepSeekV4StateDictAdapter
from nemo_automodel.components.models.deepseek_v41 import state_dict_adapter as v41
from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41Config
from nemo_automodel.components.moe.config import MoEConfig

import fmoe

E, X, D, I = 3, 2, 64, 32
SIZES: dict[str, Any] = dict(hidden_size=D, moe_intermediate_size=I, num_hidden_layers=4, vocab_size=16)
SIZES |= dict(n_routed_experts=E, num_experts_per_tok=2, bos_token_id=0, eos_token_id=1, num_hash_layers=0)
SIZES |= dict(engram_layer_ids=[1], engram_num_embeddings=[40], engram_head_dim=64, dspark_n_routed_experts=X)
SIZES |= dict(compress_ratios=[0, 2, 2, 1, 0, 0, 0], dspark_target_layer_ids=[1, 2, 3], dspark_noise_token_id=5)
SIZES |= dict(kv_source_layer_ids=[1, 3], index_source_layer_ids=[1, 3], candidate_source_layer_id=3)
STAGE = "attn_norm.weight ffn_norm.weight attn.wkv.weight attn.kv_norm.weight attn.attn_sink hc_attn_fn hc_ffn_base"
STAGE += " ffn.gate.weight ffn.gate.bias ffn.shared_experts.w1.weight ffn.shared_experts.w2.weight"
LAYER = STAGE + " attn.compressor.wkv.weight attn.compressor.norm.weight attn.indexer.wq_b.weight"
V4 = " attn.compressor.ape attn.indexer.compressor.ape attn.indexer.compressor.norm.weight"
V41 = " ffn.gate.bias_vl engram.wkv.weight engram.embed.weight engram.q_weight"
FP8 = ("wkv.weight", "wq_b.weight", "w1.weight", "w2.weight", "engram.embed.weight")


def block(at: str, names: str, experts: int) -> dict[str, torch.Tensor]:
    made = {at + n: torch.randn(*((D, D) if n.endswith(FP8) else (D,))) for n in names.split()}
    for name in (n for n in made if "shared_experts" in n):
        made[name] = torch.randn(D, I) if "w2" in name else torch.randn(I, D)
    if at + "engram.embed.weight" in made:
        made[at + "engram.embed.weight"] = torch.randn(40, 64)
    shapes = dict(w1=(I, D), w3=(I, D), w2=(D, I))
    return made | {f"{at}ffn.experts.{e}.{w}.weight": torch.randn(s) for e in range(experts) for w, s in shapes.items()}


def top(*names: str) -> dict[str, torch.Tensor]:
    return {n: torch.randn(16, D) for n in names}


def quantised(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The codes that are there under powers of two, whatever they say."""
    made = dict(hf)
    for name, t in hf.items():
        rows, columns = t.shape if t.ndim == 2 else (0, 0)
        if ".ffn.experts." in name:
            made[name], side = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8), 1
        elif name.endswith(FP8) and "compressor" not in name and t.ndim == 2:
            made[name], side = t.to(torch.float8_e4m3fn), 1 if "engram.embed" in name else 32
        else:
            continue
        scale = torch.randint(120, 134, (-(-rows // side), columns // 32), dtype=torch.uint8)
        scale[0, 0] = 0  # 2^-127
        made[name.removesuffix("weight") + "scale"] = scale.view(torch.float8_e8m0fnu)
    return made


def moe(experts: int) -> MoEConfig:
    none: dict[str, Any] = dict(n_expert_groups=0, n_limited_groups=0, gate_bias_update_factor=0.0, aux_loss_coeff=0.0)
    none |= dict(train_gate=True, score_func="sqrtsoftplus", route_scale=1.5, norm_topk_prob=True, inter_dim=I)
    sizes = dict(n_routed_experts=experts, n_shared_experts=1, n_activated_experts=2, dim=D, moe_inter_dim=I)
    return MoEConfig(**none, **sizes)


def compared() -> dict[str, Any]:
    """Case -> how many names both give with the same numbers, and what one gives alone or with others."""
    how = BackendConfig(attn="sdpa", dispatcher="torch", experts="torch_mm")
    torch.manual_seed(0)
    whole = DeepseekV41Config(text_config=SIZES)
    small = dict(head_dim=D, qk_rope_head_dim=16, compress_ratios=[0, 4, 128, 0, 0])
    four = DeepSeekV4StateDictAdapter(DeepseekV4Config(**SIZES | small), moe(E), how, torch.float32)
    one = v41.DeepseekV41StateDictAdapter(whole, moe(E), how, torch.float32)
    draft = v41.DeepseekV41DSparkStateDictAdapter(whole.text_config, moe(X), how, torch.float32)
    ends = top("embed.weight", "head.weight")
    model = block("layers.1.", LAYER + V41, E) | ends | top("norm.weight", "image_start", "vision.norm.weight")
    drafted = block("mtp.0.", STAGE + " main_proj.weight", X)
    fp8 = dict(quantization_config=dict(quant_method="fp8", scale_fmt="ue8m0", weight_block_size=[32, 32]))
    v4 = block("layers.1.", LAYER + V4, E) | ends | top("norm.weight", "hc_head_fn")
    cases = {
        "deepseek_v4": (four, v4 | block("mtp.0.", STAGE + " e_proj.weight", E), {}),
        "deepseek_v41": (one, model, {}),
        "deepseek_v41 in codes": (one, quantised(model), fp8),
        "deepseek_v41's draft": (draft, drafted, {}),
        "deepseek_v41's draft in codes": (draft, quantised(drafted), fp8),
    }
    made = {}
    for case, (theirs, hf, more) in cases.items():
        kind = case.split()[0].removesuffix("'s")
        ours = fmoe.adapter(kind, SIZES | {"dtype": "float32"} | more, system="automodel").from_hf(hf)
        want = theirs.from_hf({n: t.clone() for n, t in hf.items()})
        same = {n for n, t in want.items() if n in ours and torch.equal(t.double(), ours[n].double())}
        made[case] = {"same": len(same), "not": sorted((want.keys() | ours.keys()) - same)}
    return made
