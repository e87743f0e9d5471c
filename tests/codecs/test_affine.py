"""GPTQ, AWQ and integers with zero points: as published, kept, put in order, trained and refused."""

import affine_cases
import pytest
import torch
from foreign_cases import E, checkpoint
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.config import quantization_of
from fmoe.codecs.formats import FORMATS
from fmoe.testing import same

ALL = [n for n, f in FORMATS.items() if f.zeros]
FEW = ["gptq int4", "gptq_v2 int8", "awq int4", "int4 pack zeros", "int8 channel zeros"]
BLOCK = "model.layers.0.mlp.experts."
STACKS = (BLOCK + "gate_and_up_projs", BLOCK + "down_projs")
every, few = pytest.mark.parametrize("fmt", ALL), pytest.mark.parametrize("fmt", FEW)


def attention(fmt, order=None, o=40, i=64, group=32, **config):
    """A matrix outside the experts: (adapter's config, parts, what they say)."""
    hf, said = affine_cases.parts(fmt, "model.layers.0.self_attn.q_proj", o, i, group, order=order)
    told = affine_cases.config_of(fmt, group) | config
    return {"model_type": "qwen3_moe", "torch_dtype": "float32", "quantization_config": told}, hf, said


@every
def test_a_matrix_outside_the_experts_is_decoded_as_published_and_comes_back(fmt):
    for i, group in ((64, 32), (96, 96), (128, 16)):
        config, hf, said = attention(fmt, i=i, group=group)
        adapter = fmoe.adapter("qwen3_moe", config)
        native = adapter.from_hf(hf)
        assert torch.equal(native["model.layers.0.self_attn.q_proj.weight"].double(), said.float().double())
        same(adapter.to_hf(native), hf)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_16_bits_hold_leads_back_to_the_codes(fmt, dtype):
    config, hf, said = attention(fmt)
    adapter = fmoe.adapter("qwen3_moe", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
    if "int8" in fmt and dtype == torch.bfloat16:  # whose eight bits do not hold nine
        with pytest.raises(fmoe.AdapterError, match="more than 128 from their zero point.*Fix: dtype='float32'"):
            adapter.from_hf(hf)
        return
    native = adapter.from_hf(hf)
    assert torch.equal(native["model.layers.0.self_attn.q_proj.weight"], said.float().to(dtype))
    same(adapter.to_hf(native), hf)


@every
def test_kept_codes_are_in_one_order_whatever_the_file_had(fmt):
    config, hf, said = checkpoint("qwen3_moe", fmt)
    native = fmoe.adapter("qwen3_moe", config, quantized="keep").from_hf(hf)
    f, beside = FORMATS[fmt], FORMATS[fmt].beside
    for name, parts in zip(STACKS, (("gate_proj", "up_proj"), ("down_proj",)), strict=True):
        codes, scale, zero = (native[name + end] for end in ("", beside, f"{beside}_second"))
        assert codes.dtype == f.stored and zero.dtype == torch.uint8 and zero.shape == scale.shape
        for e in range(E):
            found = (
                f.decode(codes[e].mT, scale[e].mT, torch.float32, second=zero[e].mT) if "channel" not in fmt else None
            )
            wanted = torch.cat([said[f"{e}.{p}"] for p in parts])
            assert found is None or torch.equal(found.double(), wanted.float().double())


@few
def test_experts_run_on_kept_codes_as_on_what_they_say(fmt):
    config, hf, _ = checkpoint("qwen3_moe", fmt)
    config |= {"hidden_act": "silu"}
    x, routing = torch.randn(3, 32), fmoe.Routing(torch.tensor([[0], [2], [0]]), torch.ones(3, 1))
    ys = []
    for how in ({}, {"quantized": "keep"}):
        adapter = fmoe.adapter("qwen3_moe", config, **how)
        params = fmoe.subtree(adapter.from_hf(hf), BLOCK.rstrip("."))
        ys.append(fmoe.experts(params, x, routing, adapter.moe_config, backend="loop"))
    assert torch.equal(*ys) and bool(ys[0].any())


ORDER = [1, 0, 0, 1] * 16


@pytest.mark.parametrize("fmt", [n for n in ALL if n.startswith("gptq")])
def test_an_activation_order_is_honoured_and_no_kept_codes_are_misread(fmt):
    config, hf, said = attention(fmt, ORDER, desc_act=True)
    adapter = fmoe.adapter("qwen3_moe", config)
    native = adapter.from_hf(hf)
    assert torch.equal(native["model.layers.0.self_attn.q_proj.weight"].double(), said.float().double())
    assert not torch.equal(said, attention(fmt)[2])
    same(adapter.to_hf(native), hf)
    with pytest.raises(fmoe.AdapterError, match=f"g_idx': {fmt} with an activation order.*without quantized='keep'"):
        fmoe.adapter("qwen3_moe", config, quantized="keep").from_hf(hf)


def test_without_the_group_of_each_column_they_are_neighbours():
    config, hf, said = attention("gptq int4")
    hf.pop("model.layers.0.self_attn.q_proj.g_idx")
    for how in ({}, {"quantized": "keep"}):
        adapter = fmoe.adapter("qwen3_moe", config, **how)
        same(adapter.to_hf(adapter.from_hf(hf)), hf)


def test_the_first_version_stores_zero_points_less_one_and_the_config_says_which():
    _, hf, said = attention("gptq int4")
    first, _, _ = attention("gptq int4")
    second, _, _ = attention("gptq_v2 int4")
    read = lambda config: fmoe.adapter("qwen3_moe", config).from_hf(hf)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(read(first).double(), said.float().double()) and not torch.equal(read(first), read(second))


@pytest.mark.parametrize("told", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "gptq", "bits": 8}, None])
@pytest.mark.parametrize("fmt", [n for n in ALL if n.startswith("gptq")])
def test_a_version_that_nobody_says_is_known_by_symmetric_zero_points_or_refused(fmt, told):
    stem, bits = "model.layers.0.self_attn.q_proj", 8 if "int8" in fmt else 4
    (q, z, s), group = affine_cases.numbers(40, 64, 32, bits), [c // 32 for c in range(64)]
    made = lambda z: affine_cases.gptq(stem, q, z, s, bits, group, less=int("v2" not in fmt))
    config = {"model_type": "qwen3_moe", "torch_dtype": "float32"} | ({"quantization_config": told} if told else {})
    for zeros in (z, torch.full_like(z, 2 ** (bits - 1))):
        for how in ({}, {"quantized": "keep"}):
            adapter = fmoe.adapter("qwen3_moe", config, **how)
            if (told is None or zeros is not z) if "v2" in fmt else (told is None and zeros is z):
                with pytest.raises(fmoe.AdapterError, match="does not say which version it is") as error:
                    adapter.from_hf(made(zeros))
                assert stem in error.value.keys[0]
                continue
            native = adapter.from_hf(made(zeros))
            same(adapter.to_hf(native), made(zeros))
            if not how and "v2" not in fmt:  # without a word GPTQ's version is the first, as it is for Transformers
                assert torch.equal(native[f"{stem}.weight"], (q - zeros[:, group]) * s.float()[:, group])


@few
def test_changed_numbers_go_back_to_the_nearest_code_or_are_refused(fmt, tmp_path):
    config, hf, _ = checkpoint("qwen3_moe", fmt)
    adapter = fmoe.adapter("qwen3_moe", config)
    native = adapter.from_hf(hf)
    assert fmoe.save(native, tmp_path / "same", adapter, fsync=False).notes == ()
    steps = {n: native[n].abs().max() / 15 for n in STACKS}
    nudged = native | {n: native[n] + 1e-4 * steps[n] * torch.rand(native[n].shape) for n in STACKS}
    with pytest.raises(fmoe.AdapterError, match="changed numbers reach another code.*quantization=False"):
        fmoe.save(nudged, tmp_path / "small", adapter, fsync=False)
    halved = native | {n: native[n] / 2 for n in STACKS}  # within what scales reach, and off their codes
    if "channel" not in fmt and "pack" not in fmt:
        (note,) = fmoe.save(halved, tmp_path / "large", adapter, fsync=False).notes
        assert "changed numbers reach another code" in note
        back = adapter.from_hf(adapter.to_hf(halved))
        scale = max(float(t.abs().max()) for n, t in native.items() if n.endswith(FORMATS[fmt].beside))
        assert all((back[n] - halved[n]).abs().max() <= scale / 2 * 1.001 for n in STACKS)
    beyond = native | {n: native[n] * 40 for n in STACKS}
    with pytest.raises(fmoe.AdapterError, match="expected what its scale and zero point reach.*calibration.*Fix"):
        adapter.to_hf(beyond)
    fmoe.save(nudged, tmp_path / "plain", adapter, quantization=False, fsync=False)
    assert all(torch.equal(fmoe.load(tmp_path / "plain")[n], nudged[n]) for n in STACKS)


@few
def test_a_file_becomes_a_plain_one_whose_config_says_nothing_and_kept_says_the_same(fmt, tmp_path):
    config, hf, said = checkpoint("qwen3_moe", fmt)
    save(config, hf, tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "plain", "hf", dtype="float32", fsync=False)
    fmoe.verify(tmp_path / "plain")
    found = {n: t for f in (tmp_path / "plain").glob("*.safetensors") for n, t in load_file(f).items()}
    assert torch.equal(found[BLOCK + "2.down_proj.weight"].double(), said["2.down_proj"].float().double())
    assert not any(n.endswith(("qzeros", "scales", "zero_point", "g_idx", "weight_scale")) for n in found)
    assert quantization_of(fmoe.adapter(tmp_path / "plain").config) is None
    fmoe.convert(tmp_path / "hf", tmp_path / "kept", quantized="keep", fsync=False)
    fmoe.convert(tmp_path / "kept", tmp_path / "again", "hf", quantized="keep", fsync=False)
    again = {n: t for f in (tmp_path / "again").glob("*.safetensors") for n, t in load_file(f).items()}
    same(again, hf)
    assert quantization_of(fmoe.adapter(tmp_path / "again").config) == config["quantization_config"]


def test_parts_that_do_not_fit_or_are_missing_are_named():
    config, hf, _ = attention("gptq int4")
    stem, adapter = "model.layers.0.self_attn.q_proj", fmoe.adapter("qwen3_moe", config)
    for part in ("qweight", "qzeros", "scales"):
        with pytest.raises(fmoe.AdapterError) as error:
            adapter.from_hf({n: t for n, t in hf.items() if not n.endswith(part)})
        assert f"{stem}.{part}" in error.value.keys, part
    odd = {"qzeros": torch.ones(2, 4).int(), "scales": torch.ones(2, 41).half(), "g_idx": torch.zeros(7).int()}
    for part, tensor in odd.items():
        with pytest.raises(fmoe.AdapterError, match=part):
            adapter.from_hf(hf | {f"{stem}.{part}": tensor})
    for bad, text in ((torch.nan, "a scale is nan, expected finite"), (torch.inf, "a scale is inf, expected finite")):
        with pytest.raises(fmoe.AdapterError, match=text):
            adapter.from_hf(hf | {f"{stem}.scales": torch.full((2, 40), bad).half()})
    with pytest.raises(fmoe.AdapterError, match="codes under a scale of 0.0"):
        adapter.from_hf(hf | {f"{stem}.scales": torch.zeros(2, 40).half()})


def test_what_zero_points_leave_of_a_word_is_0_or_told():
    config, hf, said = attention("int4 pack zeros", o=41)
    adapter, name = fmoe.adapter("qwen3_moe", config), "model.layers.0.self_attn.q_proj.weight_zero_point"
    same(adapter.to_hf(adapter.from_hf(hf)), hf)
    odd = hf[name].clone()
    odd[-1, 0] |= 1 << 30
    with pytest.raises(fmoe.AdapterError, match="leave of a word is not 0, expected 41 rows"):
        adapter.from_hf(hf | {name: odd})


@pytest.mark.parametrize("quantize", ["gptq", "awq", "gptq int4", "int4 pack zeros"])
def test_no_fresh_export_is_made_of_what_is_calibrated(quantize):
    with pytest.raises(fmoe.AdapterError, match="expected one of 'fp8', 'mxfp8', 'mxfp4', 'int4', 'nvfp4'"):
        fmoe.adapter("qwen3_moe", {}, quantize=quantize)


@few
def test_a_config_that_says_nothing_is_told_what_the_tensors_are(fmt, tmp_path):
    config, hf, _ = checkpoint("qwen3_moe", fmt)
    told = config.pop("quantization_config")
    adapter = fmoe.adapter("qwen3_moe", config)
    if fmt.startswith("gptq") or fmt == "int8 pack zeros":  # which only a config tells apart
        adapter = fmoe.adapter("qwen3_moe", config | {"quantization_config": told})
    fmoe.save(adapter.from_hf(hf), tmp_path / "hf", adapter, fsync=False)
    found = quantization_of(fmoe.adapter(tmp_path / "hf").config)
    flat = lambda d: d | (d.get("config_groups", {}).get("group_0", {}).get("weights") or {})
    group = 0 if "channel" in fmt else 32
    expected = {n: v for n, v in flat(told).items() if n not in ("desc_act", "config_groups", "group_size", "strategy")}
    assert expected.items() <= flat(found).items(), found
    assert not group or flat(found)["group_size"] == group
    same(fmoe.load(tmp_path / "hf"), adapter.from_hf(hf))
