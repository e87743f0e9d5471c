"""The names that Automodel's loader looks up, of the ten families that it renames beyond experts: drawn tensors.

Names and shapes are those of the research page. Every row says all native names, and what is where is compared.
"""

import pytest
import torch
from torch import cat, stack

import fmoe
from fmoe.integrations import automodel

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
}


def row(config, hf, names, at):
    words = names.split()
    renamed = dict(zip(words[::2], words[1::2], strict=True))
    gates = {n: drawn(E, D) for n in renamed if n.endswith("mlp.gate.weight")}
    return config, hf | {n: drawn(I) for n in renamed} | gates, renamed, at


FAMILIES = {kind: row(*parts) for kind, parts in ROWS.items()}


def adapter(name):
    kind, config = name.split()[0], FAMILIES[name][0]
    return fmoe.adapter(kind, {"model_type": kind} | config, system="automodel")


def halves(hf):
    """gate and up [E, I, D] and down [E, D, I], whatever the family's layout."""
    of = lambda *ends: [
        t for n, t in hf.items() if n.endswith(ends) and (".experts." in n or ".moe." in n) and t.ndim > 1
    ]
    if both := of("gate_up_proj", "w13_weight"):
        return *both[0].split(I, 1), of("experts.down_proj", "w2_weight")[0]
    if (gate := of(".gate_proj.weight"))[:1] and gate[0].ndim == 3:
        return gate[0], of(".up_proj.weight")[0], of(".down_proj.weight")[0]
    one = lambda w: stack([t for n, t in hf.items() if n.endswith(f"{w}.weight") and "experts." in n and t.ndim == 2])
    words = W123 if any(".w1." in n for n in hf) else [f".{g}_proj" for g in GATED]
    return tuple(map(one, words))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_numbers_are_those_of_its_loader_and_come_back(name):
    _, hf, renamed, at = FAMILIES[name]
    made = adapter(name)
    there = made.from_hf(hf)
    assert all(torch.equal(there[b], hf[a]) for a, b in renamed.items())
    gate, up, down = halves(hf)
    up_gate = cat([gate, up], 1).mT
    if name == "inkling_mm_model":  # rows in turn, as on disk
        up_gate = hf["model.llm.layers.1.mlp.experts.w13_weight"].mT
    if name == "gemma4":
        down = down * hf["model.language_model.layers.1.router.per_expert_scale"][:, None, None]
    assert torch.equal(there[at + "gate_and_up_projs"], up_gate) and torch.equal(there[at + "down_projs"], down.mT)
    more = {at + "gate_and_up_projs", at + "down_projs"}
    if name == "bailing_moe_v2":
        for kind in ("weight", "bias"):
            rows = hf[f"model.layers.0.attention.query_key_value.{kind}"].split([6, 3, 3])
            for p, part in zip("qkv", rows, strict=True):
                more.add(f"model.layers.0.self_attn.{p}_proj.{kind}")
                assert torch.equal(there[f"model.layers.0.self_attn.{p}_proj.{kind}"], part)
    if name == "mistral4":
        bias = there["model.layers.1.mlp.gate.e_score_correction_bias"]
        more.add("model.layers.1.mlp.gate.e_score_correction_bias")
        assert bias.dtype == torch.float32 and bias.shape == (E,) and not bias.any()
    assert there.keys() == {*renamed.values(), *more}
    back = made.to_hf(there)
    assert back.keys() == hf.keys()
    if name != "gemma4":
        assert made.lossless and all(torch.equal(t, back[n]) for n, t in hf.items())
        return
    assert not made.lossless and (back["model.language_model.layers.1.router.per_expert_scale"] == 1).all()
    again = made.from_hf(back)
    assert all(torch.equal(t, there[n]) for n, t in again.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_integration_gives_its_loader_these_names_and_takes_them_in_place_or_converted(name):
    kind, (config, hf, *_) = name.split()[0], FAMILIES[name]
    made = automodel.StateDictAdapter({"model_type": kind} | config, dtype=None)
    want = adapter(name).from_hf(hf)
    model = {n: torch.zeros_like(t) for n, t in want.items()}  # what a model holds before it is loaded
    lent = made.to_hf(model)
    assert lent.keys() == hf.keys()
    for n, t in lent.items():  # the loader reads files into them
        t.copy_(hf[n])
    rest = made.from_hf(lent)
    assert rest.keys() | made.view_loaded_native_keys == want.keys()
    assert all(torch.equal(rest.get(n, model[n]), t) for n, t in want.items())


def test_what_is_not_zero_has_no_place_in_mistral4_on_disk():
    there = adapter("mistral4").from_hf(FAMILIES["mistral4"][1])
    there["model.layers.1.mlp.gate.e_score_correction_bias"][1] = 1
    with pytest.raises(fmoe.AdapterError, match="e_score_correction_bias.*not zero.*lossy=True"):
        adapter("mistral4").to_hf(there)


def test_the_talker_of_qwen3_omni_is_refused_unless_lossy():
    hf = FAMILIES["qwen3_omni_moe"][1] | {"talker.x": drawn(1), "code2wav.y": drawn(1)}
    with pytest.raises(fmoe.AdapterError, match="'talker.x'|talker"):
        adapter("qwen3_omni_moe").from_hf(hf)
    config = {"model_type": "qwen3_omni_moe"} | FAMILIES["qwen3_omni_moe"][0]
    lossy = fmoe.adapter("qwen3_omni_moe", config, system="automodel", lossy=True)
    assert "talker.x" not in lossy.from_hf(hf)
