"""Stacks of experts in codes with stacks of scales: decoded as their definition says, kept, and back bit for bit."""

import pytest
import torch
from hf import save
from stack_cases import FAMILIES, PAIRS, STACKS, TURNED, E, checkpoint, parts

import fmoe
from fmoe.codecs.formats import FORMATS
from fmoe.testing import same

EVERY = pytest.mark.parametrize(("fmt", "family"), PAIRS)


def stacks(native):
    return [next(t for n, t in native.items() if n.endswith(end)) for end in ("gate_and_up_projs", "down_projs")]


@EVERY
@pytest.mark.parametrize("how", ["decode", "keep"])
def test_every_stack_is_read_and_comes_back_a_range_of_it_too(fmt, family, how):
    config, hf, said = checkpoint(family, fmt)
    adapter = fmoe.adapter(family, config, quantized=how)
    native = adapter.from_hf(hf)
    same(adapter.to_hf(native), hf)
    same(adapter.resolve(hf).to_hf(native), hf)
    some = range(1, 3)
    part = {n: t[1:3] if t.ndim and len(t) == E and "original_shape" not in n else t for n, t in hf.items()}
    same(adapter.to_hf(adapter.from_hf(hf, e=some), e=some), part)
    if how == "decode":
        for found, wanted in zip(stacks(native), said.values(), strict=True):
            wanted = wanted if family in TURNED else wanted.mT
            wanted = torch.cat([wanted[..., 0::2], wanted[..., 1::2]], -1) if _in_turn(family, wanted) else wanted
            near = (found.double() - wanted).abs() <= 1.2e-7 * wanted.abs()  # two scales, folded in fp32
            assert bool(near.all()) and found.dtype == torch.float32


@EVERY
def test_experts_run_on_every_stack_that_is_kept(fmt, family):
    config, hf, _ = checkpoint(family, fmt)
    layer, found = "model.layers.0." + ("feed_forward" if family == "llama4_text" else "mlp"), []
    x, routing = torch.randn(4, 128), fmoe.Routing(torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]]), torch.rand(4, 2))
    tiles = [("keep", "triton")] if fmt == "mxfp8 stack side" else []  # blocks along columns, as none else has them
    for how, backend in (("decode", "loop"), ("keep", "loop"), *tiles):
        adapter = fmoe.adapter(family, config, quantized=how)
        params = fmoe.subtree(adapter.from_hf(hf), f"{layer}.experts")
        found.append(fmoe.experts(params, x, routing, adapter.moe_config, backend=backend))
    for y in found[1:]:  # sums differ by the order of storage
        torch.testing.assert_close(y, found[0], rtol=1e-5, atol=1e-5 * float(found[0].abs().max()))


def _in_turn(family, wanted):
    return family.startswith("inkling") and wanted.shape[-1] == 2 * wanted.shape[1]


@pytest.mark.parametrize("fmt", ["nvfp4 stack amax", "mxfp8 stack"])
def test_inkling_2_is_decoded_as_transformers_decodes_it_bit_for_bit(fmt):
    loading = pytest.importorskip("transformers.core_model_loading")
    if not hasattr(loading, "Inkling2LoopDequantizeExperts"):
        pytest.skip("transformers 5.24 has it")
    config, hf, _ = checkpoint("inkling2_text", fmt)
    ours = stacks(fmoe.adapter("inkling2_text", config).from_hf(hf))
    for name, found in zip(("w13_weight", "w2_weight"), ours, strict=True):
        parts = [f"model.layers.0.mlp.experts.{name}{end}"
                 for end in ("", "_scale", "_amax", "_outer_scale_denominator")]  # fmt: skip
        model = type("M", (), {"get_parameter": lambda self, _: torch.empty(0)})()
        given = {n: hf[n] for n in parts if n in hf}
        theirs = loading.Inkling2LoopDequantizeExperts().convert(given, parts, ["w"], model, "w")["w"].mT
        theirs = torch.cat([theirs[..., 0::2], theirs[..., 1::2]], -1) if name == "w13_weight" else theirs
        assert torch.equal(found, theirs)


@pytest.mark.parametrize("fmt", [n for n in STACKS if FORMATS[n].second])
def test_experts_that_changed_get_new_codes_and_the_others_keep_theirs(fmt):
    family = FAMILIES[fmt][0]
    config, hf, _ = checkpoint(family, fmt)
    adapter = fmoe.adapter(family, config)
    native = adapter.from_hf(hf)
    name = next(n for n in native if n.endswith("down_projs"))
    changed = native[name].clone()
    changed[1] = torch.randn(changed.shape[1:]) / 8
    back = adapter.to_hf(native | {name: changed})
    codes = next(n for n in hf if n.endswith(("w2_weight", "down_proj")))
    assert torch.equal(back[codes][[0, 2]], hf[codes][[0, 2]]) and not torch.equal(back[codes][1], hf[codes][1])
    again = adapter.from_hf(back)[name]
    assert torch.equal(again[[0, 2]], native[name][[0, 2]])
    assert (again[1] - changed[1]).abs().max() <= changed[1].abs().max() / 5
    larger = adapter.from_hf(adapter.to_hf(native | {name: native[name] * 64}))[name]
    assert (larger / 64 - native[name]).norm() <= 0.1 * native[name].norm()


@pytest.mark.parametrize("part", ["_weight_scale", "_weight_scale_2"])
def test_a_part_that_is_missing_or_of_another_shape_is_named(part):
    config, hf, _ = checkpoint("llama4_text", "nvfp4 stack")
    key = f"model.layers.0.feed_forward.experts.gate_up_proj{part}"
    for wrong in ({}, {key: torch.zeros(2, 2)}):
        with pytest.raises(fmoe.AdapterError) as error:
            fmoe.adapter("llama4_text", config).from_hf({n: t for n, t in hf.items() if n != key} | wrong)
        assert key in error.value.keys or key in str(error.value)


def test_codes_along_an_axis_that_no_product_sums_over_are_decoded_and_not_kept():
    """ModelOpt's MXFP4 of Llama 4, whose matrices are [in, out]."""
    block = "model.layers.0.feed_forward.experts."
    hf, up = parts("mxfp4 stack side", f"{block}gate_up_proj", torch.randn(E, 64, 256))
    more, down = parts("mxfp4 stack side", f"{block}down_proj", torch.randn(E, 128, 64))
    hf, adapter = hf | more, fmoe.adapter("llama4_text", {"torch_dtype": "float32"})
    native = adapter.from_hf(hf)
    assert all(torch.equal(a.double(), b) for a, b in zip(stacks(native), (up, down), strict=True))
    same(adapter.resolve(hf).to_hf(native), hf)
    with pytest.raises(fmoe.AdapterError, match="along an axis that no product sums over. Fix: decode it"):
        fmoe.adapter("llama4_text", quantized="keep").from_hf(hf)


@pytest.mark.parametrize("family", TURNED)
def test_nvfp4_of_stacks_is_written_as_modelopt_writes_it(family, tmp_path):
    config, hf, _ = checkpoint(family, "nvfp4 stack")
    native = fmoe.adapter(family, config).from_hf(hf)
    plain = {n: t for n, t in native.items() if "_scale" not in n and "_activation" not in n}
    config.pop("quantization_config")
    save(config, fmoe.adapter(family, config).to_hf(plain), tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "codes", "hf", quantize="nvfp4", fsync=False)
    fmoe.verify(tmp_path / "codes", quantized="keep")
    adapter = fmoe.adapter(tmp_path / "codes")
    said = adapter.config["quantization_config"]
    assert (said["quant_method"], said["quant_algo"]) == ("modelopt", "NVFP4")
    again = fmoe.load(tmp_path / "codes")
    for n, t in plain.items():
        assert again[n].shape == t.shape and (again[n] - t).norm() <= 0.1 * t.norm()
