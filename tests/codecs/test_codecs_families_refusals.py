"""Quantised checkpoints of every family: parts that are missing, wrong or no scales are named."""

import pytest
import torch
from codec_cases import CASES, MLP, E, config, e2m1, fused, made, per_expert
from hf import save

import fmoe
from fmoe.codecs.formats import FORMATS
from fmoe.testing import same

ALL = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]}")
HOW = pytest.mark.parametrize("how", ["decode", "keep"])
UP, DOWN = "experts.gate_and_up_projs", "experts.down_projs"


@ALL
def test_every_part_that_is_missing_wrong_or_too_much_is_named(case):
    adapter, tensors = made(case)
    opened = fmoe.adapter(case[0], config(case[0], 128, 256))
    keys = [n for n in tensors if ".experts." in n and "bias" not in n and "activation" not in n]
    if any(".1." in n for n in (k.partition("experts")[2] for k in keys)):
        keys = [n for n in keys if ".experts.1." in n]
    for how in ("decode", "keep"):
        for a in (
            fmoe.adapter(case[0], config(case[0], 128, 256), quantized=how),
            adapter if how == "decode" else opened,
        ):
            for key in keys:
                t = tensors[key]
                wrong = [{n: v for n, v in tensors.items() if n != key}, tensors | {key: t.to(torch.float64)}]
                wrong += [tensors | {key: t[..., None]}, tensors | {f"{key}_again": t}]
                wrong += [tensors | {key: t[:-1]}] if t.ndim else []
                wrong += [tensors | {key: t.mT.contiguous()}] if t.ndim > 1 and t.shape[-1] != t.shape[-2] else []
                for spoiled in wrong:
                    with pytest.raises(fmoe.AdapterError) as error:
                        a.from_hf(spoiled)
                    assert {key, f"{key}_again"} & set(error.value.keys), (key, str(error.value))


@ALL
def test_scales_that_are_none_are_named_in_memory_and_in_files(case, tmp_path):
    adapter, tensors = made(case)
    f = FORMATS[case[1]]
    key = next(n for n in tensors if n.endswith(f.scale.partition("}")[2]) and "activation" not in n)
    scale = tensors[key].clone()
    flat = scale.view(torch.uint8).view(-1) if scale.dtype.itemsize == 1 else scale.view(-1)
    flat[-1] = 255 if scale.dtype.itemsize == 1 else float("nan")
    with pytest.raises(fmoe.AdapterError, match="expected finite scales") as error:
        adapter.from_hf(tensors | {key: scale})
    assert error.value.keys == (key,)
    save(config(case[0], 128, 256), tensors | {key: scale}, tmp_path / "hf")
    for call in (fmoe.verify, fmoe.load, lambda p: fmoe.convert(p, tmp_path / "out", fsync=False)):
        with pytest.raises(fmoe.AdapterError, match="expected finite scales"):
            call(tmp_path / "hf")


def test_a_scale_byte_0_is_the_least_power_of_two_and_255_does_not_pass_verify(tmp_path):
    adapter, tensors = made(("deepseek_v4", "mxfp4 .scale"))
    key, one = "layers.1.ffn.experts.1.w3.scale", tensors["layers.1.ffn.experts.1.w3.weight"].view(torch.uint8)[0, 0]
    tensors[key] = tensors[key].clone()
    tensors[key].view(torch.uint8)[0, 0] = 0
    native = adapter.from_hf(tensors)
    up = next(t for n, t in native.items() if n.endswith(UP))
    assert float(up[1, 0, up.shape[2] // 2]) == e2m1(int(one) & 15) * 2.0**-127 and one & 7
    same(adapter.to_hf(native), tensors)
    tensors[key].view(torch.uint8)[0, 0] = 255
    save(config("deepseek_v4", 128, 256), tensors, tmp_path)
    with pytest.raises(fmoe.AdapterError, match="a scale is nan, expected finite scales") as error:
        fmoe.verify(tmp_path)
    assert error.value.keys == (key,)
    fmoe.verify(tmp_path, quantized="keep")


def test_int4_says_its_shape_and_another_is_refused():
    for how in ("decode", "keep"):
        adapter, tensors = made(("kimi_k25", "int4"), quantized=how)
        key = next(n for n in tensors if n.endswith("weight_shape"))
        with pytest.raises(fmoe.AdapterError, match="says") as error:
            adapter.from_hf(tensors | {key: tensors[key] + 1})
        assert key in error.value.keys


@HOW
def test_scale_is_a_part_of_what_is_quantised_and_elsewhere_a_word(how):
    adapter, tensors = made(("deepseek_v4", "mxfp4 .scale"), quantized=how)
    other = tensors | {"layers.1.attn_hc.scale": torch.ones(3)}
    same(adapter.to_hf(adapter.from_hf(other)), other)
    orphan = "layers.1.attn.wq_a.scale"
    with pytest.raises(
        fmoe.AdapterError, match=r"the scale of 'layers.1.attn.wq_a.weight', which is missing. Fix: give"
    ) as error:
        adapter.from_hf(tensors | {orphan: torch.ones(1, 1).to(torch.float8_e8m0fnu)})
    assert orphan in error.value.keys


def test_scales_of_nothing_are_refused_on_the_way_back():
    adapter, tensors = made(("mistral4", "fp8 expert [E 1 1]"))
    native = adapter.from_hf(tensors)
    for end in ("_scale_each", "_activation_expert"):
        name = next(n for n in native if n.endswith(DOWN + end))
        wrong = {n: t for n, t in native.items() if not (n.endswith("_scale_each") and end != "_scale_each")}
        wrong = wrong if end != "_scale_each" else {n: t for n, t in native.items() if not n.endswith(DOWN)}
        with pytest.raises(fmoe.AdapterError) as error:
            adapter.to_hf(wrong)
        assert any("down_proj" in key for key in error.value.keys), name


def test_blocks_that_a_seam_would_tear_are_kept_by_nobody():
    for tensors, kind in (
        (per_expert(MLP, "fp8 blocks", ("gate_proj", "up_proj", "down_proj"), 128, 200), "deepseek_v3"),
        (per_expert("layers.1.ffn.experts.", "fp8 blocks .scale", ("w1", "w3", "w2"), 128, 100), "deepseek_v4"),
    ):
        adapter = fmoe.adapter(kind, None, quantized="keep")
        with pytest.raises(
            fmoe.AdapterError, match="is no multiple of 128, so blocks of 128 would not stay whole"
        ) as e:
            adapter.from_hf(tensors)
        assert all(".down_proj." not in k and ".w2." not in k for k in e.value.keys) and len(e.value.keys) == 2 * E
    plain = fused(MLP, None, 64, 96, turned=True)
    with pytest.raises(fmoe.AdapterError, match="not quantised, and quantized='keep' moves codes") as error:
        fmoe.adapter("gpt_oss", None, quantized="keep").from_hf(plain)
    assert f"{MLP}gate_up_proj" in error.value.keys


def test_numbers_and_codes_are_not_taken_for_each_other():
    kept, tensors = made(("deepseek_v3", "fp8 blocks"), quantized="keep")
    decoding, _ = made(("deepseek_v3", "fp8 blocks"))
    with pytest.raises(fmoe.AdapterError, match="expected numbers to encode"):
        decoding.to_hf(kept.from_hf(tensors))
    with pytest.raises(fmoe.AdapterError):
        kept.to_hf(decoding.from_hf(tensors))
    with pytest.raises(fmoe.AdapterError, match="quantized='keep' what is quantised stays so"):
        kept.to_hf(kept.from_hf(tensors), quantization=True)
    with pytest.raises(fmoe.AdapterError, match="expected 'decode' or 'keep'"):
        fmoe.adapter("deepseek_v3", quantized="kept")
    with pytest.raises(fmoe.AdapterError, match="not a value to cast"):
        fmoe.adapter("deepseek_v3", dtype=torch.float32, quantized="keep").from_hf(tensors)
