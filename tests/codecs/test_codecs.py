"""Formats: decoding against their definition, one number at a time; encoding, in parts as in whole."""

from dataclasses import replace

import pytest
import torch
from codec_cases import by_hand
from format_cases import ALL, FORMATS, exactly, shape_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fmoe
from fmoe.codecs import blocks, values
from fmoe.codecs.formats import Format
from fmoe.types import bits

SMALL = {n: replace(f, block=(3, 5), sizes="") if f.block == (128, 128) else f for n, f in FORMATS.items()}
SHAPES = st.sampled_from([(1, 1), (3, 5), (7, 11), (4, 1), (6, 10), (1, 13)])


def exponents(f: Format) -> tuple[int, int]:
    """The least and the largest k for which every code under 2^k comes back from bf16."""
    return (-127, 125) if f.code == "e2m1" else (-120, 118)


def drawn(f: Format, shape: tuple[int, ...], seed: int, dtype: torch.dtype, spread: int) -> tuple[Tensor, Tensor]:
    """Any codes, and scales of any size up to 2^+-spread, the extremes too."""
    made = torch.Generator().manual_seed(seed)
    spec = f.codes_spec(shape)
    codes = torch.randint(0, 256, (spec.nbytes,), generator=made, dtype=torch.uint8).view(spec.dtype).view(spec.shape)
    low, high = exponents(f)
    k = torch.randint(-spread, spread + 1, f.scale_shape(shape), generator=made).clamp(low, high)
    if dtype in (torch.uint8, values.E8M0):
        return codes, (k + 127).to(torch.uint8).view(dtype)
    scale = torch.ldexp(1 + torch.rand(k.shape, generator=made), k - (k == high).int())
    return codes, scale.clamp(max=values.MOST[f.code] and 2.0**118).to(dtype)


@ALL
@settings(max_examples=12)
@given(SHAPES, st.integers(0, 9999), st.sampled_from([0, 3, 30, 127]), st.sampled_from([torch.bfloat16, torch.float32]))
def test_decoding_is_its_definition_and_its_bytes_come_back(name, sizes, seed, spread, dtype):
    f = SMALL[name]
    shape = shape_of(f, *sizes)
    for kind in f.scales:
        codes, scale = drawn(f, shape, seed, kind, min(spread, 9) if kind == torch.float16 else spread)
        decoded = f.decode(codes, scale, dtype)
        assert decoded.shape == shape and decoded.dtype == dtype
        expected = by_hand(f, codes, scale).float().to(dtype)
        assert torch.equal(decoded.isnan(), expected.isnan())
        assert torch.equal(decoded.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
        assert torch.equal(decoded.signbit(), by_hand(f, codes, scale).signbit()) or f.code == "e4m3"  # NaN's apart
        exactly(f.encode(decoded, scale), (codes, scale))  # NaN's sign, and -0, too


@ALL
@settings(max_examples=20)
@given(SHAPES, st.integers(0, 9999), st.floats(0, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_was_encoded_is_near_and_comes_back_without_its_scale(name, sizes, seed, spread, dtype):
    f = SMALL[name]
    shape = shape_of(f, *sizes)
    made = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn((*shape[:-1], 1), generator=made))
    weight = (torch.randn(shape, generator=made) * size).to(dtype)
    weight[torch.rand(shape, generator=made) < 0.1] = 0
    for kind in f.scales:
        f_ = replace(f, scales=(kind,))
        if kind == torch.float16 and not 1e-4 < float(weight.abs().max()) < 1e4:
            continue
        codes, scale = f_.encode(weight)
        near, ones = by_hand(f, codes, scale), torch.ones_like(by_hand(f, codes, scale))
        step = by_hand(replace(f, code=f.code), *one_of(f, shape, scale)).abs() * ones
        error, w = (near - weight.double()).abs(), weight.double().abs()
        bound = {"e4m3": 2**-4 * w + 2**-10 * step, "e2m1": w / 5 + step / 4}.get(f.code, step / 2)
        if kind != torch.float16:
            assert (error <= bound * (1 + 2**-7)).all()
        if f.code != "int8":  # whose seven bits and the scale's five are more than bf16 holds
            exactly(f_.encode(f.decode(codes, scale, torch.float32)), (codes, scale))
            exactly(f_.encode(f.decode(codes, scale, torch.bfloat16)), (codes, scale))


def one_of(f: Format, shape: tuple[int, ...], scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes that all say 1 (-1 of int4, which has more of them)."""
    spec = f.codes_spec(shape)
    byte = {"e4m3": 0x38, "e2m1": 0x22, "int4": 0x77, "int8": 0x01 if f.stored == torch.int8 else 0x7F}[f.code]
    return torch.full((spec.nbytes,), byte, dtype=torch.uint8).view(spec.dtype).view(spec.shape), scale


@ALL
def test_a_changed_block_gets_a_scale_of_its_own_and_the_others_keep_theirs(name):
    f = FORMATS[name]
    shape = f.as_stored((2, 256, 256)) if f.each or f.grouped or f.stack else (256, 256)
    made = torch.Generator().manual_seed(1)
    dtype = f.scales[0]
    codes, _ = f.encode(torch.randn(shape, generator=made))
    scale = torch.rand(f.scale_shape(shape), generator=made).add(0.5)
    if dtype in (torch.uint8, values.E8M0):
        scale = torch.randint(120, 130, f.scale_shape(shape), generator=made, dtype=torch.uint8).view(dtype)
    scale = scale.to(dtype)
    trained = f.decode(codes, scale, torch.float32).clone()
    trained[..., :1, :1] = 3000 * trained.abs().max()
    again, used = f.encode(trained, scale)
    differs = values.as_number(used) != values.as_number(scale)
    assert int(differs.sum()) == max(1, len(shape) - 1 if f.rank != 0 else 1)  # the first block, of each of two experts
    if used.numel() > 4:
        assert torch.equal(f.decode(again, used, torch.float32)[..., 130:, 130:], trained[..., 130:, 130:])
    assert float(f.decode(again, used, torch.float32).abs().max()) > 2000 * float(f.decode(codes, scale).abs().max())


def test_every_format_encodes_in_parts_as_in_whole(monkeypatch):
    torch.manual_seed(0)
    for f in FORMATS.values():
        weight = torch.randn(f.as_stored((3, 300, 160)) if f.each or f.grouped or f.stack else (300, 160))
        whole = f.encode(weight)
        decoded = f.decode(*whole)
        monkeypatch.setattr(blocks, "_PART", 1)
        monkeypatch.setattr(values, "_CHUNK", 200)
        exactly(f.encode(weight), whole)
        exactly(f.encode(decoded, whole[1]), whole)
        assert torch.equal(f.decode(*whole), decoded)
        monkeypatch.undo()


def test_numbers_do_not_depend_on_how_a_thread_treats_subnormal_ones():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    small = ("fp8 blocks", codes.view(values.E4M3), torch.ones(1, 1)), ("mxfp4 packed", codes, codes[:, :1] % 2)
    tell = lambda: [FORMATS[n].decode(c, s, d) for n, c, s in small for d in (torch.float32, torch.bfloat16)]
    expected = tell()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        values._powers.cache_clear(), values._scaled_pairs.cache_clear()
        found = tell()
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if {torch.uint8, values.E8M0} & {*f.scales}])
def test_every_byte_of_a_scale_is_the_power_of_two_that_torch_has_or_it_is_refused(name, dtype):
    """0 is 2^-127, 254 is 2^127, 255 NaN: what is decoded comes back, and what is refused could not."""
    f = FORMATS[name]
    shape = f.as_stored((1, 32, 32)) if f.grouped or f.stack else (32, 32)
    spec, kind = f.codes_spec(shape), next(s for s in f.scales if s in (torch.uint8, values.E8M0))
    every = torch.arange(spec.nbytes) % (256 if f.code == "e2m1" else 127)  # of e4m3 without NaN
    codes = every.to(torch.uint8).view(spec.dtype).view(spec.shape)
    scales = lambda byte: torch.full(f.scale_shape(shape), byte, dtype=torch.uint8).view(kind)
    said, refused = f.decode(codes, scales(127), torch.float32), []
    assert torch.equal(said.double(), by_hand(f, codes, scales(127)))
    for byte in (*range(10), 127, *range(243, 256)):
        wanted = said.double() * torch.tensor(byte, dtype=torch.uint8).view(values.E8M0).double()
        try:
            found = f.decode(codes, scales(byte), dtype)
        except ValueError as error:
            assert "a scale is" in str(error) or "codes under a scale of" in str(error)
            assert 2.0 ** (byte - 127) < f.least(dtype) or not torch.equal(wanted.to(dtype).double(), wanted)
            refused.append(byte)
            continue
        assert torch.equal(found.double(), wanted) and torch.equal(found.signbit(), said.signbit())
        exactly(f.encode(found, scales(byte)), (codes, scales(byte)))
    assert 255 in refused and (0 in refused) == (dtype != torch.float32 and (f.code, dtype) != ("e2m1", torch.bfloat16))


def test_ties_go_to_the_even_code():
    row = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([6, 0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    f = FORMATS["mxfp4 packed"]
    weight = torch.cat([row, -row, row, -row]).view(1, 32)
    expected = torch.cat([even, -even, even, -even]).view(1, 32)
    assert torch.equal(f.decode(*f.encode(weight), torch.float32), expected)
    assert torch.equal(f.decode(*f.encode(weight * 2**20), torch.float32), expected * 2**20)


def test_transformers_decodes_mxfp4_alike():
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    f = FORMATS["mxfp4 blocks"]
    codes, scale = drawn(f, (2, 96, 6), 0, torch.uint8, 20)
    assert torch.equal(f.decode(codes, scale), _convert_moe_packed_tensors(codes, scale))


@pytest.mark.parametrize(
    "name", ["fp8 blocks", "fp8 blocks .scale", "fp8 tensor", "mxfp8", "mxfp4 .scale", "mxfp4 packed"]
)
def test_transformers_decodes_these_alike(name):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    f = FORMATS[name]
    codes, scale = drawn(f, (256, 384), 0, f.scales[0], 20)
    theirs = codes.view(torch.int8) if f.code == "e2m1" else codes
    found = Fp8Dequantize(None)._dequantize_one(theirs, scale, torch.bfloat16)
    ours = f.decode(codes, scale)
    assert torch.equal(ours.nan_to_num(nan=1e30), found.nan_to_num(nan=1e30))


def test_torch_has_the_same_e4m3_and_e8m0():
    every = torch.arange(256, dtype=torch.uint8)
    f = FORMATS["fp8 tensor"]
    found = f.decode(every.view(values.E4M3).view(1, 256), torch.ones(()), torch.float32)[0]
    assert torch.equal(found.nan_to_num(nan=1e9), every.view(values.E4M3).float().nan_to_num(nan=1e9))
    theirs = every.view(values.E8M0).float()
    assert torch.equal(values.as_number(every).nan_to_num(nan=-1), theirs.nan_to_num(nan=-1))
    assert torch.equal(values.as_scale(theirs[1:255], torch.uint8), every[1:255])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_that_no_scale_explains_are_no_expert_weights(dtype, keep):
    config = {"num_experts": 2, "hidden_size": 4, "moe_intermediate_size": 3, "num_experts_per_tok": 1}
    how = {"quantized": "keep"} if keep else {}
    adapter, block = fmoe.adapter("qwen3_moe", config, **how), "model.layers.0.mlp.experts."
    hf = {f"{block}{e}.{p}_proj.weight": torch.ones(3, 4) for e in range(2) for p in ("gate", "up")}
    hf |= {f"{block}{e}.down_proj.weight": torch.ones(4, 3).to(dtype) for e in range(2)}
    with pytest.raises(fmoe.AdapterError) as error:
        adapter.from_hf(hf)
    assert {f"{block}{e}.down_proj.weight" for e in range(2)} <= set(error.value.keys)
    native = {block + "gate_and_up_projs": torch.ones(2, 4, 6), block + "down_projs": torch.ones(2, 3, 4).to(dtype)}
    with pytest.raises(fmoe.AdapterError, match="down_proj"):
        adapter.to_hf(native)
