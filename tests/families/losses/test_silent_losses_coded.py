"""What others lose without a word, of codes, scales and LoRA matrices: "12.n" as in `test_silent_losses`."""

from collections.abc import Callable
from typing import Any

import hf_synthetic as synthetic
import hf_zoo as zoo
import pytest
import torch
from directories import load
from silent_cases import CONFIG, E4M3, experts, into, lora_of, mesh_of, refused

import fmoe
from fmoe.testing import same

CASES: dict[str, Callable[..., None]] = {}
case = into(CASES)


@case("12.25")
def eight_bits_are_decoded_or_refused(tmp_path) -> None:
    for model_type in (
        "qwen3_moe",
        "glm4_moe",
        "hy_v3",
        "laguna",
        "bailing_moe_v2",
        "minimax_m2",
        "olmoe",
        "qwen3_next",
    ):
        head = "model.layers.0." + ("block_sparse_moe" if model_type == "minimax_m2" else "mlp") + ".experts."
        names = dict(gate="w1", up="w3", down="w2") if model_type == "minimax_m2" else {}
        tensors = {n: torch.full_like(t, 3.0).to(E4M3) for n, t in experts(head).items()}
        for ours, theirs in names.items():
            tensors = {n.replace(f"{ours}_proj", theirs): t for n, t in tensors.items()}
        scales = {f"{n}_scale_inv": torch.full((1, 1), 0.5) for n in tensors}
        native = fmoe.adapter(model_type).from_hf(tensors | scales)
        assert all(t.eq(1.5).all() for n, t in native.items() if n.endswith("_projs")), model_type
        one = next(iter(tensors))
        for wrong in (tensors, tensors | {n: s for n, s in scales.items() if one not in n}):
            with refused(one):
                fmoe.adapter(model_type).from_hf(wrong)


@case("12.41", "12.43")
def mtp_experts_and_all_else_in_eight_bits(tmp_path) -> None:
    config, tensors = synthetic.qwen3_5_moe_fp8(only=synthetic.QWEN3_5_ALL)
    adapter = fmoe.adapter("qwen3_5_moe", config).resolve(tensors)
    native = adapter.from_hf(tensors)
    weights = [n for n in tensors if tensors[n].dtype == E4M3]
    alone = [n for n in weights if ".experts." not in n]
    assert alone and any(n.startswith("mtp.") for n in weights)
    shown = {n.replace("mlp.shared_expert.", "mlp.shared_experts."): n for n in alone}
    for name, key in shown.items():
        if name in native:
            scale = synthetic.spread(tensors[f"{key}_scale_inv"].float(), tensors[key].shape)
            assert torch.equal(native[name], (tensors[key].float() * scale).to(torch.bfloat16))
    assert len(shown.keys() & native.keys()) > len(alone) / 2
    same(adapter.to_hf(native), tensors)


@case("12.42", "12.54")
def eight_bits_on_a_mesh(tmp_path) -> None:
    """Scales of the whole matrix, of which a rank's part need not begin where a block does."""
    for make in (synthetic.qwen3_5_moe_fp8, synthetic.deepseek_v3_fp8):
        config, tensors = make()
        adapter = fmoe.adapter(config.get("text_config", {}).get("model_type") or config["model_type"], config)
        whole = adapter.from_hf(tensors)
        with mesh_of((2, 2), ("ep_shard", "ep"), rank=3) as mesh:
            mine = adapter.from_hf(tensors, mesh)
            for name in (n for n in whole if n.endswith("_projs")):
                E, D = whole[name].shape[:2]
                found: Any = mine[name]
                assert torch.equal(found.to_local(), whole[name][E // 2 :, D // 2 :]), name


@case("12.49")
def a_routing_bias_keeps_its_dtype(tmp_path) -> None:
    head = "language_model.model.layers.0.mlp."  # layer 0 has no rule of its own
    tensors = {n: t.bfloat16() for n, t in experts(head + "experts.").items()}
    tensors |= {head + "gate.e_score_correction_bias": torch.randn(4)}
    adapter = fmoe.adapter("kimi_k25", dtype="bf16")
    native = adapter.from_hf(tensors)
    assert native[head + "gate.e_score_correction_bias"].dtype == torch.float32
    assert native[head + "experts.down_projs"].dtype == torch.bfloat16
    same(adapter.to_hf(native), tensors)  # and nothing is quantised that was not


@case("12.51", "12.52")
def what_is_quantised_gets_real_scales(tmp_path) -> None:
    for name in ("glm_moe_dsa", "mimo_v2_flash"):
        _, path = zoo.saved(name)
        tensors, adapter = load(path), fmoe.adapter(path)
        native = adapter.from_hf(tensors)
        same(adapter.to_hf(native), tensors)
        same(adapter.to_hf(native, quantization=False), tensors)
        fresh = adapter.to_hf(native, quantization=True)
        coded = {n for n, t in fresh.items() if t.dtype == E4M3}
        assert any(".experts." in n for n in coded)
        assert not any(part in n for n in coded for part in ("norm", "embed", "lm_head", "mlp.gate.", "bias"))
        for n in coded:
            scale = synthetic.spread(fresh[f"{n}_scale_inv"].float(), fresh[n].shape)
            assert (fresh[n].float() * scale - tensors[n]).abs().max() <= tensors[n].abs().max() / 16
        assert {n for n in fresh if n.endswith("_scale_inv")} == {f"{n}_scale_inv" for n in coded}


@case("12.53")
def a_scale_per_expert_may_be_there_or_not(tmp_path) -> None:
    _, path = zoo.saved("gemma4_text")
    tensors, adapter = load(path), fmoe.adapter(path)
    scale = "model.layers.0.router.per_expert_scale"
    assert scale in tensors
    same(adapter.to_hf(adapter.from_hf(tensors)), tensors)
    without = {n: t for n, t in tensors.items() if n != scale}
    same(adapter.to_hf(adapter.from_hf(without)), without)


@case("12.31")
def lora_halves_and_ranks(tmp_path) -> None:
    """A lone gate or up, experts that are not all there, another A for up than for gate, rows that are no E r."""
    adapter = fmoe.adapter("qwen3_moe", CONFIG, lora="per-expert")
    whole = adapter.to_hf(lora_of())
    for half in ("up_proj", "gate_proj"):
        gone = [n for n in whole if half in n]
        with refused(*gone):
            adapter.from_hf({n: t for n, t in whole.items() if n not in gone})
    missing = next(n for n in whole if ".2.up_proj.lora_B" in n)
    with refused(missing):
        adapter.from_hf({n: t for n, t in whole.items() if n != missing})
    own = {n: t + 1 if "up_proj.lora_A" in n else t for n, t in whole.items()}
    found = adapter.from_hf(own)
    assert next(t for n, t in found.items() if n.endswith("lora_gate_and_up_A")).shape == (4, 5, 2, 2)
    same(adapter.to_hf(found), own)
    peft = fmoe.adapter("qwen3_moe", CONFIG)
    packed = peft.to_hf(lora_of())
    short = next(n for n in packed if n.endswith("base_layer.lora_A.weight"))
    with refused(short):
        peft.from_hf(packed | {short: packed[short][:-1]})


@case("12.32")
def lora_of_w1_w3_w2_families_bears_their_names(tmp_path) -> None:
    config = CONFIG | dict(num_local_experts=4, intermediate_size=3)
    for name in ("mixtral", "minimax_m2", "kimi_linear"):
        adapter = fmoe.adapter(name, config, lora="per-expert")
        files = adapter.to_hf(lora_of())
        assert {n.split(".")[-3] for n in files} == {"w1", "w2", "w3"}
        assert all(".block_sparse_moe.experts." in n and n.startswith("base_model.model.") for n in files)
        same(adapter.from_hf(files), lora_of())


@case("12.50")
def gpt_oss_blocks_of_any_width_and_in_pairs(tmp_path) -> None:
    """Two groups of 32, where others say 90 for all; half a pair is named."""
    config = dict(num_local_experts=2, num_experts_per_tok=1, hidden_size=64, intermediate_size=32)
    adapter, head = fmoe.adapter("gpt_oss", config), "model.layers.0.mlp.experts."
    made = torch.Generator().manual_seed(0)
    draw = lambda *shape, low=0, high=256: torch.randint(low, high, shape, generator=made, dtype=torch.uint8)
    parts = {head + "gate_up_proj_blocks": draw(2, 64, 2, 16), head + "down_proj_blocks": draw(2, 64, 1, 16)}
    parts |= {head + "gate_up_proj_scales": draw(2, 64, 2, low=110, high=140)}
    parts |= {head + "down_proj_scales": draw(2, 64, 1, low=110, high=140)}
    parts |= {head + "gate_up_proj_bias": torch.randn(2, 64), head + "down_proj_bias": torch.randn(2, 64)}
    native = adapter.from_hf(parts)
    assert native[head + "gate_and_up_projs"].shape == (2, 64, 64)
    same(adapter.to_hf(native), parts)
    for half in (n for n in parts if "_bias" not in n):
        with refused(half):
            adapter.from_hf({n: t for n, t in parts.items() if n != half})


@case("12.55b")
def lora_is_never_quantised(tmp_path) -> None:
    for name in ("deepseek_v3", "glm_moe_dsa"):
        _, path = zoo.saved(name)
        adapter = fmoe.adapter(path)
        native = adapter.from_hf(load(path))
        stem = next(n for n in native if n.endswith("down_projs")).removesuffix("down_projs")
        E, I, D = native[stem + "down_projs"].shape
        lora = {stem + "lora_down_A": torch.randn(E, I, 2), stem + "lora_down_B": torch.randn(E, 2, D)}
        lora |= {
            stem + "lora_gate_and_up_A": torch.randn(E, D, 2),
            stem + "lora_gate_and_up_B": torch.randn(E, 2, 2 * I),
        }
        for form in ("peft", "per-expert"):
            fresh = fmoe.adapter(path, lora=form).to_hf(native | lora, quantization=True)
            assert any(t.dtype == E4M3 for t in fresh.values())
            assert not any("lora" in n and (t.dtype == E4M3 or "scale" in n) for n, t in fresh.items())


@pytest.mark.parametrize("number", CASES)
def test_nothing_is_lost_without_a_word(number, tmp_path):
    CASES[number](tmp_path)
