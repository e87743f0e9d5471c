"""Formats that tools write for any family: decoded as their definition says, kept, and back bit for bit, everywhere."""

from dataclasses import replace

import pytest
import torch
from codec_cases import by_hand
from foreign_cases import NAMES, READ, E, checkpoint
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.foreign import twofold
from fmoe.codecs.formats import FOREIGN, FORMATS
from fmoe.codecs.parts import as_named
from fmoe.testing import same
from fmoe.types import bits

FAMILIES = [*NAMES]
# zero points are the same program in all families: one each, the others when there is time
ONE_EACH = {f: FAMILIES[k % len(FAMILIES)] for k, f in enumerate(n for n in READ if FORMATS[n].zeros)}
PAIRS = [
    pytest.param(fmt, family, marks=pytest.mark.slow if ONE_EACH.get(fmt, family) != family else ())
    for fmt in READ
    for family in FAMILIES
]


@pytest.mark.parametrize(("fmt", "family"), PAIRS)
def test_every_format_is_read_in_every_family_and_comes_back(family, fmt):
    config, hf, said = checkpoint(family, fmt)
    _, names, _ = NAMES[family]
    for how in ("decode", "keep"):
        adapter = fmoe.adapter(family, config, quantized=how)
        native = adapter.from_hf(hf)
        same(adapter.to_hf(native), hf)
        same(adapter.resolve(hf).to_hf(native), hf)
        some, apart = adapter.from_hf(hf, e=range(1, 3)), ("input_scale", "g_idx")
        part = {n: t for n, t in hf.items() if ".experts.0." not in n or n.endswith(apart)}
        same(adapter.to_hf(some, e=range(1, 3)), part)
        if how == "decode":
            up = next(t for n, t in native.items() if n.endswith("gate_and_up_projs"))
            down = next(t for n, t in native.items() if n.endswith("down_projs"))
            for e in range(E):
                wanted = torch.cat([said[f"{e}.{n}"] for n in names[:-1]]).T
                assert torch.equal(up[e].double(), wanted.float().double())
                assert torch.equal(down[e].double(), said[f"{e}.{names[-1]}"].T.float().double())


@pytest.mark.parametrize("fmt", [n for n, f in FOREIGN.items() if f.second and not f.zeros and not f.stack])
def test_a_change_that_codes_under_two_scales_would_lose_is_refused(fmt, tmp_path):
    config, hf, _ = checkpoint("qwen3_moe", fmt)
    adapter = fmoe.adapter("qwen3_moe", config)
    native = adapter.from_hf(hf)
    assert fmoe.save(native, tmp_path / "same", adapter, fsync=False).notes == ()
    stacks = [n for n in native if n.endswith("_projs")]
    nudge = native | {n: native[n] * (1 + 2**-7 * torch.rand(native[n].shape)) for n in stacks}
    with pytest.raises(fmoe.AdapterError, match="changed numbers reach another code.*quantization=False"):
        fmoe.save(nudge, tmp_path / "small", adapter, fsync=False)
    large = native | {n: native[n] + native[n].std() * torch.randn(native[n].shape) for n in stacks}
    (note,) = fmoe.save(large, tmp_path / "large", adapter, fsync=False).notes
    assert "changed numbers reach another code" in note


@pytest.mark.parametrize("fmt", ["int4 pack", "int8 pack"])
@pytest.mark.parametrize("group", [16, 32])
def test_the_size_of_groups_is_what_shapes_say(fmt, group):
    config, hf, said = checkpoint("qwen3_moe", fmt, group)
    native = fmoe.adapter("qwen3_moe", config).from_hf(hf)
    down = native["model.layers.0.mlp.experts.down_projs"]
    assert all(torch.equal(down[e], said[f"{e}.down_proj"].T.float()) for e in range(E))
    same(fmoe.adapter("qwen3_moe", config).to_hf(native), hf)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("fmt", ["fp8 blocks", "fp8 blocks .scale", "fp8 side blocks"])
def test_square_blocks_are_what_shapes_say(fmt, side):
    f = replace(FORMATS[fmt], block=(side, side))
    torch.manual_seed(0)
    name = "layers.0.attn.wq_a.weight"
    codes, scale = f.encode(torch.randn(200, 72))
    p = as_named(name, f, (200, 72))
    hf = {p.codes: codes, p.scale: scale}
    adapter = fmoe.adapter("deepseek_v4", {"torch_dtype": "float32"})
    native = adapter.from_hf(hf)
    assert torch.equal(native[name].double(), by_hand(f, codes, scale).float().double())
    same(adapter.to_hf(native), hf)


def test_deepseek_v41_has_three_formats_at_once():
    torch.manual_seed(0)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}, "torch_dtype": "bfloat16"}
    hf = {}
    for fmt, name, shape in (
        ("mxfp4 .scale", "layers.0.ffn.experts.0.w1.weight", (32, 64)),
        ("mxfp4 .scale", "layers.0.ffn.experts.0.w3.weight", (32, 64)),
        ("mxfp4 .scale", "layers.0.ffn.experts.0.w2.weight", (64, 32)),
        ("fp8 blocks .scale", "layers.0.attn.wq_a.weight", (70, 40)),
        ("mxfp8 .scale", "layers.0.engram.embed.weight", (100, 256)),
    ):
        f = FORMATS[fmt]
        f = replace(f, block=(32, 32)) if fmt == "fp8 blocks .scale" else f
        codes, scale = f.encode(torch.randn(shape))
        p = as_named(name, f, shape)
        hf |= {p.codes: codes, p.scale: scale}
    adapter = fmoe.adapter("deepseek_v4", config)
    native = adapter.from_hf(hf)
    assert native["layers.0.engram.embed.weight"].dtype == torch.bfloat16
    same(adapter.to_hf(native), hf)


@pytest.mark.parametrize("part", ["pre_quant_scale", "svdquant_lora_a", "weight_g_idx"])
def test_what_is_not_decoded_is_refused_by_name(part):
    config, hf, _ = checkpoint("qwen3_moe", "int4 pack")
    key = f"model.layers.0.mlp.experts.0.up_proj.{part}"
    with pytest.raises(fmoe.AdapterError, match="int4 pack with .*, which fmoe does not decode") as error:
        fmoe.adapter("qwen3_moe", config).from_hf(hf | {key: torch.zeros(1, dtype=torch.int32)})
    assert key in error.value.keys


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4 packed"])
def test_nvfp4_is_near_what_it_encodes_and_as_modelopt_scales_it(fmt):
    f = FORMATS[fmt]
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    weight[:, :16] = 0
    codes, scale, second = twofold.encode(f, weight)
    whole = 1 / second if f.divides else second
    assert torch.allclose(whole, weight.abs().max() / 2688) and bool((scale[:, 0].float() == 1).all())
    step = scale.float().repeat_interleave(16, 1) * whole
    assert bool(
        ((f.decode(codes, scale, torch.float32, second=second) - weight).abs() <= weight.abs() / 4 + step / 2).all()
    )
    again = twofold.encode(f, f.decode(codes, scale, torch.bfloat16, second=second), scale, second)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, (codes, scale, second), strict=True))
    with pytest.raises(ValueError, match="expected finite"):
        twofold.encode(f, weight / 0)


def test_a_second_scale_that_is_missing_or_alone_is_named():
    config, hf, _ = checkpoint("qwen3_moe", "nvfp4")
    key = "model.layers.0.mlp.experts.0.up_proj.weight_scale_2"
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("qwen3_moe", config).from_hf({n: t for n, t in hf.items() if n != key})
    assert key in error.value.keys


@pytest.mark.parametrize("fmt", ["nvfp4", "int4 pack", "gptq int8", "awq int4", "fp8 side channel", "mxfp8 side"])
def test_natives_of_any_dtype_beside_their_codes_are_verified_and_go_back(fmt, tmp_path):
    config, hf, _ = checkpoint("qwen3_moe", fmt)
    save(config, hf, tmp_path / "hf")
    native, adapter = fmoe.load(tmp_path / "hf", dtype="float32"), fmoe.adapter(tmp_path / "hf")
    how = {"layout": "native", "fsync": False}
    fmoe.save(native, tmp_path / "native", adapter, **how)
    assert fmoe.verify(tmp_path / "native").tensors == len(native)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    same(load_file(tmp_path / "back" / "model.safetensors"), hf)
    fmoe.save(native, tmp_path / "plain", adapter, quantization=False, **how)
    fmoe.verify(tmp_path / "plain")
    fmoe.convert(tmp_path / "plain", tmp_path / "plain hf", "hf", fsync=False)
    assert "quantization_config" not in fmoe.adapter(tmp_path / "plain hf").config
    with pytest.raises(fmoe.AdapterError, match="quantization=True.* Fix: layout='hf'|the family has no quantised"):
        fmoe.save(fmoe.load(tmp_path / "plain"), tmp_path / "codes", adapter, quantization=True, **how)
