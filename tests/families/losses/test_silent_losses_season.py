"""What Automodel 0.7.0 and publishers of quantised checkpoints lose without a word: here an error, or the exact result.

"3.n" are Automodel's bugs by their number, other numbers what they are of; `test_season_elsewhere` has the rest.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kept
import naive
import pytest
import torch
from foreign_cases import checkpoint as quantised
from silent_cases import CONFIG, E4M3, experts, into, lora_of, refused
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe.codecs.config import EXPORTS
from fmoe.integrations import automodel
from fmoe.nn import GroupedExpertsMXFP4
from fmoe.testing import same
from fmoe.types import EXPERT_ACTIVATIONS, MoEConfig, bits

CASES: dict[str, Callable[..., None]] = {}
case = into(CASES)
HEAD = "model.layers.0.mlp.experts."


@case("3.1")
def an_expert_of_another_shape_or_dtype(tmp_path) -> None:
    key, tensors = HEAD + "2.gate_proj.weight", experts()
    loader: Any = automodel.StateDictAdapter({"model_type": "qwen3_moe"} | CONFIG, dtype=torch.float32)
    lent = loader.to_hf(fmoe.adapter("qwen3_moe", CONFIG).from_hf(tensors))
    for wrong in (tensors[key][:2], tensors[key].bfloat16()):
        for read in (fmoe.adapter("qwen3_moe", CONFIG), fmoe.adapter("qwen3_moe"), loader):
            for given in (tensors, lent):
                with refused(key):
                    read.from_hf(given | {key: wrong})


@case("3.2")
def a_replay_computed_again(tmp_path) -> None:
    """Backward after everything else, through a checkpoint: by the routing that was given."""
    for way in (
        dict(),
        dict(softmax_before_topk=True),
        dict(score_func="sigmoid"),
        dict(score_func="sigmoid_with_bias"),
    ):
        config = MoEConfig(
            n_routed_experts=5,
            n_activated_experts=2,
            dim=6,
            moe_inter_dim=4,
            dtype=torch.float64,
            norm_topk_prob=True,
            **way,
        )
        drawn = torch.Generator().manual_seed(0)
        params = {f"experts.{n}": p for n, p in naive.draw(config).items()}
        params["gate.e_score_correction_bias"] = torch.randn(5, generator=drawn, dtype=torch.float64)
        params = params if way.get("score_func") else {n: p for n, p in params.items() if "correction" not in n}
        x = torch.randn(7, 6, generator=drawn, dtype=torch.float64)
        gate = torch.randn(5, 6, generator=drawn, dtype=torch.float64)
        given = (fmoe.route(params | {"gate.weight": gate}, x, config).indices + 1) % 5

        def grad(again: bool, **how: Any) -> torch.Tensor:
            leaf = gate.clone().requires_grad_()  # noqa: B023
            f = lambda x: fmoe.moe(params | {"gate.weight": leaf}, x, config, **how)  # noqa: B023
            y = checkpoint(f, x, use_reentrant=False) if again else f(x)  # noqa: B023
            fmoe.moe(params | {"gate.weight": leaf}, x, config)  # noqa: B023
            y.square().sum().backward()
            assert leaf.grad is not None
            return leaf.grad

        torch.testing.assert_close(grad(True, indices=given), grad(False, indices=given))
        assert not torch.allclose(grad(True, indices=given), grad(False))


@case("3.3")
def lora_of_nothing_beside_every_activation(tmp_path) -> None:
    codes, decoded, config = kept.layer("mxfp4 packed")
    x, routing = kept.tokens(config)
    gated = [act for act in EXPERT_ACTIVATIONS if fmoe.is_gated_activation(act)]
    assert {"swiglu_oai", "quick_geglu"} & {*gated} and len(gated) > 4
    nothing = {n: torch.zeros_like(p) if n.endswith("_B") else p for n, p in kept.lora(config).items()}
    ys = []
    for act in gated:
        how = replace(config, expert_activation=act, activation_limit=2.0)
        ys.append(fmoe.experts(decoded, x, routing, how))
        assert torch.equal(fmoe.experts(decoded | nothing, x, routing, how), ys[-1]), act
        layer = GroupedExpertsMXFP4.from_native({n: t.clone() for n, t in codes.items()}, how, "loop")
        for name, p in nothing.items():
            layer.register_parameter(name, torch.nn.Parameter(p))
        torch.testing.assert_close(layer(x, routing.mask, routing.weights, routing.indices), ys[-1])
    assert not any(torch.equal(a, b) for i, a in enumerate(ys) for b in ys[:i])


@case("3.6, 3.8 layers for prediction")
def codes_beside_the_experts_of_glm_5(tmp_path) -> None:
    layer, config = "model.language_model.layers.0.", dict(model_type="glm5_next", text_config=CONFIG)
    adapter, weight = fmoe.adapter("glm5_next", config), layer + "self_attn.q_a_proj.weight"
    tensors = experts(layer + "mlp.experts.") | experts("model.language_model.layers.78.mlp.experts.")
    native = adapter.from_hf(tensors)
    same(adapter.to_hf(native), tensors)
    codes, scale = {weight: torch.full((4, 4), 6.0).to(E4M3)}, {weight + "_scale_inv": torch.ones(1, 1)}
    for wrong in (codes, scale, scale | {weight: torch.ones(4, 4)}):
        with refused(*(n for n in wrong if n.endswith("_scale_inv") or wrong is codes)):
            adapter.from_hf(tensors | wrong)
    assert adapter.from_hf(tensors | codes | scale)[weight].eq(6).all()
    with pytest.raises(fmoe.AdapterError, match="no quantised form"):
        adapter.to_hf(native, quantization=True)
    fresh = fmoe.adapter("glm5_next", config, quantize="fp8").to_hf(
        {n: 6.1 * t / t.abs().max() for n, t in native.items()}
    )
    assert any(t.numel() == 1 and t != 1 for n, t in fresh.items() if n.endswith("_scale_inv"))
    assert adapter.from_hf(fresh)[layer + "mlp.experts.down_projs"].abs().max() > 6


@case("3.7")
def biases_of_hunyuan_image(tmp_path) -> None:
    sizes = dict(num_experts=2, moe_topk=1, hidden_size=5, moe_intermediate_size=3)
    adapter = fmoe.adapter("hunyuan_image_3_moe", sizes)
    shapes = dict(gate_and_up_proj=(6, 5), down_proj=(5, 3))
    tensors = {f"{HEAD}{e}.{n}.weight": torch.ones(s) for e in range(2) for n, s in shapes.items()}
    tensors |= {f"{tower}.x.weight": torch.ones(2) for tower in ("vae", "vision_model", "vision_aligner")}
    same(adapter.to_hf(adapter.from_hf(tensors)), tensors)
    for n, (o, _) in shapes.items():
        key = f"{HEAD}1.{n}.bias"
        with refused(key):
            adapter.from_hf(tensors | {key: torch.ones(o)})


@case("3.9")
def what_no_code_says(tmp_path) -> None:
    """NaN and infinity are no maximum of a block: refused by name, or (e4m3) NaN alone."""
    sizes = CONFIG | dict(hidden_size=128, moe_intermediate_size=128)
    plain, key = fmoe.adapter("qwen3_moe", sizes), HEAD + "1.down_proj.weight"
    native = plain.from_hf(experts(I=128, D=128))
    for quantize in EXPORTS:
        made = fmoe.adapter("qwen3_moe", sizes, quantize=quantize)
        for bad in (torch.nan, torch.inf):
            wrong = {n: t.clone() for n, t in native.items()}
            wrong[HEAD + "down_projs"][1, 3, 2] = bad
            if bad is torch.nan and quantize in ("fp8", "mxfp8"):
                found = plain.from_hf(made.to_hf(wrong))[HEAD + "down_projs"].float()
                assert found.isnan().nonzero().tolist() == [[1, 3, 2]]
                assert (found - wrong[HEAD + "down_projs"])[1, :, 2].nan_to_num().abs().max() < 0.2
                continue
            with refused(key, match="expected finite values"):
                made.to_hf(wrong)


@case("3.11")
def stored_codes_are_no_checkpoint(tmp_path) -> None:
    config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=32, moe_inter_dim=32)
    stored = {HEAD + n: t for n, t in GroupedExpertsMXFP4(config).state_dict().items()}
    for family in ("deepseek_v4", "gpt_oss", "qwen3_moe"):
        for how in ({}, dict(quantized="keep")):
            with refused(HEAD + "down_projs_packed", HEAD + "gate_and_up_projs_scales"):
                fmoe.adapter(family, **how).to_hf(stored)


@case("3.12")
def lora_keeps_its_dtype(tmp_path) -> None:
    for family in ("kimi_k25", "qwen3_moe", "gpt_oss"):
        plain, lora = fmoe.adapter(family, lora="per-expert"), lora_of()
        cast = fmoe.adapter(family, lora="per-expert", dtype="bf16")
        same(cast.from_hf(plain.to_hf(lora)), lora)
        same(cast.to_hf(lora), plain.to_hf(lora))


@case("2.5 Nemotron's two prefixes")
def prefixes_of_lora_come_back(tmp_path) -> None:
    config = dict(
        model_type="nemotron_h", n_routed_experts=2, hidden_size=5, moe_intermediate_size=3, num_experts_per_tok=1
    )
    adapter, shapes = fmoe.adapter("nemotron_h", config), dict(up_proj=(3, 5), down_proj=(5, 3))
    for prefix in ("base_model.model.backbone.", "base_model.model.model."):
        stem = prefix + "layers.0.mixer.experts."
        files = {
            f"{stem}{e}.{p}.lora_{m}.weight": torch.randn((2, i) if m == "A" else (o, 2))
            for e in range(2) for p, (o, i) in shapes.items() for m in "AB"
        }  # fmt: skip
        native = adapter.from_hf(files)
        assert {n.rpartition("lora_")[2] for n in native} == {"gate_and_up_A", "gate_and_up_B", "down_A", "down_B"}
        same(adapter.resolve(files).to_hf(native), files)


@case("2 a router in fp32")
def a_wide_router_is_not_rounded(tmp_path) -> None:
    """Beside bf16 experts: kept by a cast, and multiplied as it is; scores of what is selected are fp32."""
    config = MoEConfig(
        n_routed_experts=64, n_activated_experts=4, dim=32, moe_inter_dim=4, score_func="sigmoid_with_bias"
    )
    drawn = torch.Generator().manual_seed(0)
    x, gate = torch.randn(256, 32, generator=drawn).bfloat16(), torch.randn(64, 32, generator=drawn)
    bias = torch.randn(64, generator=drawn) / 4
    found = fmoe.route({"gate.weight": gate, "gate.e_score_correction_bias": bias}, x, config)
    scores = lambda w, dtype: (x.to(dtype) @ w.to(dtype).T).sigmoid() + bias.to(dtype)
    chosen = lambda s: s.topk(4).indices.sort().values
    assert torch.equal(found.indices.sort().values, chosen(scores(gate, torch.float32)))
    assert not torch.equal(found.indices.sort().values, chosen(scores(gate, torch.bfloat16)))
    tensors = experts() | {"model.layers.0.mlp.gate.weight": torch.randn(4, 5)}
    cast = fmoe.adapter("qwen3_moe", CONFIG, dtype="bf16").from_hf(tensors)
    assert torch.equal(cast["model.layers.0.mlp.gate.weight"], tensors["model.layers.0.mlp.gate.weight"])


@case("1.5 a scale that is no number, 5.2 a scale of 0")
def scales_that_say_nothing(tmp_path) -> None:
    config, hf, _ = quantised("deepseek_v4", "mxfp8 side")
    key = next(n for n in hf if n.endswith("1.w1.weight_scale"))
    with refused(key, match="expected finite scales"):
        fmoe.adapter("deepseek_v4", config).from_hf(hf | {key: torch.full_like(hf[key], 255)})
    for fmt, second in (("nvfp4", "weight_scale_2"), ("nvfp4 packed", "weight_global_scale")):
        config, hf, _ = quantised("qwen3_moe", fmt)
        key = HEAD + f"1.up_proj.{second}"
        with pytest.raises(fmoe.AdapterError, match="codes under a scale of 0|expected finite scales") as error:
            fmoe.adapter("qwen3_moe", config).from_hf(hf | {key: torch.zeros_like(hf[key])})
        assert any(n.startswith(HEAD + "1.up_proj.") for n in error.value.keys)


@case("5.1 scales of activations for some experts")
def scales_of_activations_may_be_incomplete(tmp_path) -> None:
    for fmt in ("nvfp4", "nvfp4 packed", "fp8 side tensor"):
        config, hf, _ = quantised("qwen3_moe", fmt)
        told = {n for n in hf if n.endswith("input_scale")}
        assert told and len(told) < len({n.rpartition(".")[0] for n in hf})
        for how in ("decode", "keep"):
            adapter = fmoe.adapter("qwen3_moe", config, quantized=how)
            back = adapter.to_hf(adapter.from_hf(hf))
            assert {n for n in back if n.endswith("input_scale")} == told
            assert all(torch.equal(bits(back[n]), bits(hf[n])) for n in hf)


@pytest.mark.parametrize("number", CASES)
def test_nothing_is_lost_without_a_word(number, tmp_path):
    CASES[number](tmp_path)
