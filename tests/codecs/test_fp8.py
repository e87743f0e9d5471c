"""FP8 blocks: decoding against its definition, encoding with real scales, and the bytes that come back."""

import hf_synthetic as synthetic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fmoe
from fmoe.codecs.fp8 import E4M3, dequantize, grid, quantize
from fmoe.testing import same


def by_definition(weight: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    rows = torch.arange(weight.shape[0])[:, None] // block
    columns = torch.arange(weight.shape[1])[None, :] // block
    return weight.double() * scale.double()[rows, columns]


def drawn(rows: int, columns: int, seed: int, spread: float) -> Tensor:
    """Values whose magnitude differs from block to block by orders."""
    made = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(grid((rows, columns), 128), generator=made))
    values = torch.randn(rows, columns, generator=made)
    return (by_definition(values, size)).float()


def by_block(t: Tensor) -> Tensor:
    """The largest number of each block."""
    return torch.nn.functional.max_pool2d(t[None], 128, ceil_mode=True)[0]


SHAPES = st.sampled_from([(1, 1), (128, 128), (129, 127), (1, 300), (300, 1), (256, 130)])


@given(SHAPES, st.integers(0, 99), st.floats(0, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_was_encoded_comes_back_and_is_near(shape, seed, spread, dtype):
    weight = drawn(*shape, seed, spread).to(dtype)
    q, scale = quantize(weight)
    near = by_definition(q, scale)
    assert torch.equal(dequantize(q, scale, torch.float64), near)
    step = by_definition(torch.ones(shape), scale)
    assert ((near - weight.double()).abs() <= 2**-4 * weight.double().abs() + 2**-10 * step).all()
    most, near_most = (by_block(t.double().abs()) for t in (weight, near - weight.double()))
    assert (near_most <= 0.037 * most).all()  # half a step of the largest codes, 16 / 448, and the scale's seven bits
    assert ((scale - most / 448).abs() <= 2**-7 * scale).all()
    for decoded in (torch.float32, torch.bfloat16):
        again, scale_again = quantize(dequantize(q, scale, decoded))
        same({"q": again, "s": scale_again}, {"q": q, "s": scale})


def test_scales_of_all_mantissas_come_back_from_what_is_decoded():
    most = torch.linspace(1, 2, 2001)[:, None] * 2.0 ** torch.tensor([-110, -17, 0, 126])
    most[0, 3] = torch.finfo(torch.float32).max
    q, scale = quantize(most, block=1)
    assert (q.float() == 448).all()
    for decoded in (torch.float32, torch.bfloat16):
        again, kept = quantize(dequantize(q, scale, decoded, block=1), block=1)
        same({"q": again, "s": kept}, {"q": q, "s": scale})


@given(SHAPES, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_scale_that_is_carried_along_gives_the_very_bytes_back(shape, seed, dtype):
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(shape, generator=made).mul(50).clamp(-448, 448).to(E4M3)
    scale = torch.rand(grid(shape, 128), generator=made).add(1e-3).to(dtype)  # not a power of two, not of this amax
    for decoded in (torch.float32, torch.bfloat16):
        again, kept = quantize(dequantize(q, scale, decoded), scale)
        same({"q": again, "s": kept}, {"q": q, "s": scale})


def test_a_changed_block_gets_a_scale_of_its_own_and_the_others_keep_theirs():
    weight = drawn(256, 256, 0, 1.0)
    scale = weight.abs().reshape(2, 128, 2, 128).amax(dim=(1, 3)) / 448
    q = (weight / scale.repeat_interleave(128, 0).repeat_interleave(128, 1)).to(E4M3)
    trained = dequantize(q, scale, torch.float32)
    trained[:128, 128:] *= 1000
    again, used = quantize(trained, scale)
    assert (used == scale).tolist() == [[True, False], [True, True]]
    step = by_definition(torch.ones(256, 256), used)
    error = (dequantize(again, used, torch.float32) - trained).abs()
    assert (error <= 2**-4 * trained.abs() + 2**-10 * step).all()


def test_zeros_infinities_and_nan_do_not_spread():
    weight = torch.zeros(128, 384)
    weight[0, 200], weight[0, 300] = float("nan"), 5.0
    q, scale = quantize(weight)
    back = dequantize(q, scale, torch.float32)
    assert torch.equal(back[:, :128], weight[:, :128]) and (back[0, 300] - 5.0).abs() < 0.037 * 5
    assert back[0, 200].isnan() and scale.isfinite()[0, [0, 2]].all()


def test_nan_counts_for_no_scale_and_an_infinity_is_refused_by_name():
    weight = torch.full((2, 2), 3000.0)
    weight[0, 0] = float("nan")
    back = dequantize(*quantize(weight), torch.float32)
    assert back[0, 0].isnan() and (back.flatten()[1:] - 3000).abs().max() <= 3000 * 2**-4
    config, tensors = synthetic.deepseek_v3_fp8()
    adapter = fmoe.adapter("deepseek_v3", config).resolve(tensors)
    native = adapter.from_hf(tensors)
    name = "model.layers.1.mlp.experts.down_projs"
    native[name] = native[name].clone()
    native[name][1, 2, 3] = float("-inf")
    with pytest.raises(fmoe.AdapterError, match=r"-inf at \[3, 2\], expected finite") as error:
        adapter.to_hf(native)
    assert error.value.keys == ("model.layers.1.mlp.experts.1.down_proj.weight",)
    tensors[KEY + "_scale_inv"] = torch.full_like(tensors[KEY + "_scale_inv"], float("nan"))
    with pytest.raises(fmoe.AdapterError, match="expected finite scales") as error:
        adapter.from_hf(tensors)
    assert error.value.keys == (KEY + "_scale_inv",)


def test_meta_tensors_go_both_ways():
    config, tensors = synthetic.deepseek_v3_fp8()
    adapter = fmoe.adapter("deepseek_v3", config).resolve(tensors)
    same(adapter.to_hf(adapter.from_hf({n: t.to("meta") for n, t in tensors.items()})), tensors)


def test_families_decode_as_the_formula_says():
    config, tensors = synthetic.qwen3_5_moe_fp8(scale=torch.bfloat16)
    native = fmoe.adapter("qwen3_5_moe", config).from_hf(tensors)
    for prefix in ("model.language_model.layers.0", "mtp.layers.0"):
        for e in range(6):
            halves = [
                by_definition(tensors[f"{x}.weight"], tensors[f"{x}.weight_scale_inv"]).bfloat16().T
                for x in (f"{prefix}.mlp.experts.{e}.{p}_proj" for p in ("gate", "up"))
            ]
            assert torch.equal(native[f"{prefix}.mlp.experts.gate_and_up_projs"][e], torch.cat(halves, dim=1))
    wide = fmoe.adapter("qwen3_5_moe", config, dtype=torch.float32).from_hf(tensors)
    assert wide["mtp.layers.0.mlp.experts.down_projs"].dtype == torch.float32


@pytest.mark.parametrize("name, make", [("deepseek_v3", synthetic.deepseek_v3), ("qwen3_5_moe", synthetic.qwen3_5_moe)])
def test_an_export_quantises_what_the_published_checkpoint_does_with_real_scales(name, make):
    config, plain = make()
    published = {"deepseek_v3": synthetic.deepseek_v3_fp8, "qwen3_5_moe": synthetic.qwen3_5_moe_fp8}[name]()[1]
    adapter = fmoe.adapter(name, config)
    native = adapter.from_hf(plain)
    exported = adapter.to_hf(native, quantization=True)
    assert {n: t.dtype for n, t in exported.items()} == {n: t.dtype for n, t in published.items()}
    again = adapter.from_hf(exported)
    for key, weight in native.items():
        error = (again[key].float() - weight.float()).abs().max()
        assert error <= 2**-4 * weight.float().abs().max() + 1e-6, key
    same(adapter.to_hf(again, quantization=True), exported)
    same(adapter.to_hf(again), exported)  # they carry their scales now


def test_asking_for_no_quantisation_writes_plain_tensors_and_no_scale():
    config, tensors = synthetic.deepseek_v3_fp8()
    adapter = fmoe.adapter("deepseek_v3", config).resolve(tensors)
    plain = adapter.to_hf(adapter.from_hf(tensors), quantization=False)
    assert not any("scale" in n for n in plain) and not any(t.dtype == E4M3 for t in plain.values())
    assert plain.keys() == {n for n in tensors if "scale" not in n}


KEY = "model.layers.1.mlp.experts.1.gate_proj.weight"
WRONG = {
    "missing scale": lambda t: t.pop(KEY + "_scale_inv"),
    "missing weight": lambda t: t.pop(KEY),
    "scale of another shape": lambda t: t.update({KEY + "_scale_inv": torch.ones(1, 1)}),
    "scale beside bf16": lambda t: t.update({KEY: t[KEY].bfloat16()}),
    "orphan of a kept weight": lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"),
}


@pytest.mark.parametrize("what", WRONG)
def test_half_a_pair_is_refused(what):
    config, tensors = synthetic.deepseek_v3_fp8()
    WRONG[what](tensors)
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("deepseek_v3", config).from_hf(tensors)
    key = KEY if "orphan" not in what else "model.layers.1.self_attn.o_proj.weight"
    assert {key, key + "_scale_inv"} & set(error.value.keys)


def test_fused_experts_have_no_fp8_form_and_say_so():
    config, tensors = synthetic.qwen3_5_moe()
    resolved = fmoe.adapter("qwen3_5_moe", config).resolve(tensors)
    with pytest.raises(fmoe.AdapterError, match="choose layout='per_expert'"):
        resolved.to_hf(resolved.from_hf(tensors), quantization=True)


def test_nothing_decoded_is_handed_out_as_a_view():
    config, tensors = synthetic.deepseek_v3_fp8()
    adapter = fmoe.adapter("deepseek_v3", config).resolve(tensors)
    with pytest.raises(fmoe.AdapterError, match="no view of native storage"):
        adapter.views(adapter.from_hf(tensors))
