"""config.json says what the tensors are: after convert, save and the way back, in every format."""

import json
from pathlib import Path

import pytest
import torch
from codec_cases import CASES, FEW, PLAIN, config, made
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.config import EXPORTS, QUANTS, quantization_of, weight_block
from fmoe.codecs.formats import FORMATS
from fmoe.families import FAMILIES

ALL = pytest.mark.parametrize("case", CASES, ids=" ".join)
SAYS = {"quant_method": "what", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def says(path: Path) -> dict | None:
    return quantization_of(json.loads((path / "config.json").read_text()))


def held(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


@ALL
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32], ids=str)
def test_a_quantised_checkpoint_becomes_a_plain_one_in_one_call(case, dtype, tmp_path):
    adapter, tensors = made(case)
    told = config(case[0], 128, 256) | {"torch_dtype": "bfloat16", "quantization_config": SAYS}
    save(told, tensors, tmp_path / "hf")
    for name in QUANTS:
        (tmp_path / "hf" / name).write_text("{}")
    fmoe.convert(tmp_path / "hf", tmp_path / "plain", "hf", dtype=dtype, fsync=False)
    kind = fmoe.types.as_dtype(dtype)
    found, native = held(tmp_path / "plain"), adapter.from_hf(tensors)
    wanted = fmoe.adapter(case[0], config(case[0], 128, 256), dtype=dtype).resolve(tensors)
    wanted = wanted.to_hf(wanted.from_hf(tensors), quantization=False)
    assert found.keys() == wanted.keys() and not any("scale" in n for n in found if "activation" not in n)
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    assert {t.dtype for n, t in found.items() if ".experts." in n and "bias" not in n} == {kind}
    assert says(tmp_path / "plain") is None and not {*QUANTS} & {p.name for p in (tmp_path / "plain").iterdir()}
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["torch_dtype"] == str(kind).removeprefix(
        "torch."
    )
    fmoe.verify(tmp_path / "plain")
    fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "again", "hf", dtype=dtype, fsync=False)
    again = held(tmp_path / "again")
    assert again.keys() == found.keys() and {n: t.dtype for n, t in again.items()} == {
        n: t.dtype for n, t in found.items()
    }
    f = FORMATS[case[1]]  # the native one holds bf16, which rounds what e4m3 says under scales of seven bits
    as_held = torch.bfloat16 if f.code == "e4m3" and f.scales[0] in (torch.float32, torch.bfloat16) else kind
    assert all(torch.equal(again[n].to(as_held), found[n].to(as_held)) for n in found)
    assert says(tmp_path / "again") is None and native.keys()


OWN = [(n, q) for n in PLAIN for q in EXPORTS if any(name.startswith(q) for name, _ in FAMILIES[n].fresh)]


@pytest.mark.parametrize(("name", "quantize"), OWN)
def test_a_plain_checkpoint_becomes_a_quantised_one_whose_config_says_so(name, quantize, tmp_path):
    torch.manual_seed(0)
    tensors = PLAIN[name](128, 256)
    save(config(name, 128, 256), tensors, tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "codes", "hf", quantize=quantize, fsync=False)
    told = says(tmp_path / "codes")
    assert told is not None and told["quant_method"] in ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
    found = held(tmp_path / "codes")
    assert any(t.dtype.itemsize == 1 or t.dtype == torch.int32 for t in found.values())
    fmoe.verify(tmp_path / "codes")
    was = fmoe.load(tmp_path / "hf")
    for n, t in fmoe.load(tmp_path / "codes").items():
        assert "_scale" in n or (t.float() - was[n].float()).abs().max() <= was[n].float().abs().max() / 5
    fmoe.convert(tmp_path / "codes", tmp_path / "plain", "hf", dtype="bfloat16", fsync=False)
    assert held(tmp_path / "plain").keys() == tensors.keys() and says(tmp_path / "plain") is None


STACKED = {("gpt_oss", "int4")}  # whose files hold matrices


@pytest.mark.parametrize("quantize", [*EXPORTS, *FORMATS])
@pytest.mark.parametrize("name", FEW)
def test_formats_that_are_foreign_to_a_family_are_written_or_refused_by_name(name, quantize, tmp_path):
    torch.manual_seed(0)
    tensors = FEW[name](128, 256)
    save(config(name, 128, 256), tensors, tmp_path / "hf")
    write = lambda: fmoe.convert(tmp_path / "hf", tmp_path / "codes", "hf", quantize=quantize, fsync=False)
    if quantize not in EXPORTS or (name, quantize) in STACKED:
        match = "fused experts have no form in" if quantize in EXPORTS else "expected one of 'fp8', 'mxfp8', 'mxfp4'"
        with pytest.raises(fmoe.AdapterError, match=match) as error:
            write()
        assert quantize in str(error.value) and not (tmp_path / "codes").exists()
        return
    write()
    assert says(tmp_path / "codes") is not None
    held_plain = {n for n, t in held(tmp_path / "codes").items() if t.dtype == torch.bfloat16 and "scale" not in n}
    assert held_plain == {n for n in tensors if "bias" in n}
    fmoe.verify(tmp_path / "codes")
    was, now = fmoe.load(tmp_path / "hf"), fmoe.load(tmp_path / "codes")
    bound = {"fp8": 0.04, "mxfp8": 0.0625}.get(quantize, 0.2)
    for n, t in was.items():
        assert (now[n].float() - t.float()).abs().max() <= bound * t.float().abs().max()


@pytest.mark.parametrize("quantize", EXPORTS)
@pytest.mark.parametrize("name", FEW)
def test_experts_that_fill_no_whole_groups_are_refused_by_name_and_none_is_left_plain(name, quantize):
    torch.manual_seed(0)
    plain, made_ = (fmoe.adapter(name, config(name, 100, 256), **how) for how in ({}, {"quantize": quantize}))
    native = plain.from_hf(FEW[name](100, 256))
    if quantize == "fp8":
        experts = {n: t for n, t in made_.to_hf(native).items() if "scale" not in n and "bias" not in n}
        assert {t.dtype for t in experts.values()} == {torch.float8_e4m3fn}
        return
    with pytest.raises(fmoe.AdapterError, match=r"cannot be written in .*, expected whole groups of (16|32) columns"):
        made_.to_hf(native)


def test_modules_that_the_config_leaves_alone_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    tensors = PLAIN["deepseek_v3"](128, 256) | {"model.layers.1.self_attn.o_proj.weight": torch.ones(128, 128)}
    alone = "model.layers.1.mlp.experts.1.up_proj"
    told = config("deepseek_v3", 128, 256) | {
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": [alone, "re:.*o_proj"]}
    }
    found = fmoe.adapter("deepseek_v3", told)
    made_ = found.to_hf(found.from_hf(tensors), quantization=True)
    plain = {n for n, t in made_.items() if t.dtype in (torch.bfloat16, torch.float32) and "scale" not in n}
    assert plain == {alone + ".weight", "model.layers.1.self_attn.o_proj.weight"}


@ALL
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_save_says_what_it_wrote(case, layout, tmp_path):
    adapter, tensors = made(case)
    told = config(case[0], 128, 256) | {"quantization_config": SAYS}
    save(told, tensors, tmp_path / "hf")
    native, codec = fmoe.load(tmp_path / "hf"), fmoe.adapter(tmp_path / "hf")
    fmoe.save(native, tmp_path / "codes", codec, layout, fsync=False)
    assert says(tmp_path / "codes") is not None
    fmoe.save(native, tmp_path / "plain", codec, layout, quantization=False, fsync=False)
    assert says(tmp_path / "plain") is None
    fmoe.save(native, tmp_path / "plain", codec, layout, force=True, fsync=False)  # over a config that says otherwise
    assert says(tmp_path / "plain") is not None


@ALL
def test_a_change_that_codes_would_lose_is_refused_and_a_large_one_is_told(case, tmp_path):
    adapter, tensors = made(case)
    save(config(case[0], 128, 256), tensors, tmp_path / "hf")
    native, codec = fmoe.load(tmp_path / "hf"), fmoe.adapter(tmp_path / "hf")
    assert fmoe.save(native, tmp_path / "same", codec, fsync=False).notes == ()
    stacks = [n for n in native if n.endswith("_projs")]
    f = FORMATS[case[1]]
    nudge = native | {n: (native[n].float() * (1 + 2**-7 * torch.rand(native[n].shape))).bfloat16() for n in stacks}
    small = lambda: fmoe.save(nudge, tmp_path / "small", codec, fsync=False)
    if f.code == "e2m1" or f.scales[0] in (torch.uint8, torch.float8_e8m0fnu):
        with pytest.raises(fmoe.AdapterError, match="changed numbers reach another code.*quantization=False"):
            small()
        assert not list((tmp_path / "small").glob("*.safetensors"))
    fmoe.save(nudge, tmp_path / "as_is", codec, quantization=False, fsync=False)
    assert all(torch.equal(fmoe.load(tmp_path / "as_is")[n], nudge[n]) for n in stacks)
    large = native | {
        n: (native[n].float() + native[n].float().std() * torch.randn(native[n].shape)).bfloat16() for n in stacks
    }
    (note,) = fmoe.save(large, tmp_path / "large", codec, fsync=False).notes
    assert "changed numbers reach another code" in note
    for name, params in (("small", nudge), ("large", large), ("same", native)):  # merged, saved natively, converted
        fmoe.save(params, tmp_path / f"{name} native", codec, "native", fsync=False)
    refused = f.code == "e2m1" or f.scales[0] in (torch.uint8, torch.float8_e8m0fnu)
    there = lambda name, **how: fmoe.convert(
        tmp_path / f"{name} native", tmp_path / f"{name} hf", "hf", fsync=False, **how
    )
    if refused:
        with pytest.raises(fmoe.AdapterError, match="changed numbers reach another code.*dtype= in convert"):
            there("small")
        assert not (tmp_path / "small hf").exists()
    assert any("changed numbers reach another code" in note for note in there("large").notes)
    assert not any("changed numbers" in note for note in there("same").notes)
    there("small", dtype=torch.bfloat16, force=True)
    plain = fmoe.load(tmp_path / "small hf")
    assert all(torch.equal(plain[n], nudge[n]) for n in stacks)


@ALL
def test_scales_too_small_for_float16_are_refused_and_come_back_otherwise(case):
    adapter, tensors = made(case, dtype=torch.float16)
    f = FORMATS[case[1]]
    key = next(n for n in tensors if n.endswith(f.scale.partition("}")[2]) and "activation" not in n)
    scale = tensors[key].clone()
    if scale.dtype.itemsize == 1:
        scale.view(torch.uint8).fill_(127 - 25)
    else:
        scale.fill_(2.0**-24)
    tensors = tensors | {key: scale}
    with pytest.raises(fmoe.AdapterError, match="in float16 to nothing that leads back") as error:
        adapter.from_hf(tensors)
    assert error.value.keys == (key,)


def test_values_beyond_a_dtype_are_refused_by_name_in_memory_and_in_files(tmp_path):
    tensors = {n: torch.full_like(t, 1e6) for n, t in PLAIN["deepseek_v3"](128, 256).items()}
    name = "model.layers.1.mlp.experts.gate_and_up_projs"
    save(config("deepseek_v3", 128, 256), tensors, tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    for call in (
        lambda: fmoe.adapter("deepseek_v3", config("deepseek_v3", 128, 256), dtype="float16").from_hf(tensors),
        lambda: fmoe.load(tmp_path / "hf", dtype="float16"),
        lambda: fmoe.load(tmp_path / "native", dtype="float16"),
        lambda: fmoe.convert(tmp_path / "hf", tmp_path / "out", dtype="float16", fsync=False),
        lambda: fmoe.convert(tmp_path / "hf", tmp_path / "out", "hf", dtype="float16", fsync=False),
    ):
        with pytest.raises(fmoe.AdapterError, match="holds .*e\\+05|holds 1e\\+06.*float16 can hold|bfloat16"):
            call()
    for bad in ("int8", "float8_e4m3fn", torch.int32):
        with pytest.raises(fmoe.AdapterError, match="expected a float of 16 bits or more"):
            fmoe.adapter("deepseek_v3", config("deepseek_v3", 128, 256), dtype=bad)
    assert name


@pytest.mark.parametrize("bad", [128, {"a": 1}, [[128, 128], 1], [0, 128], [True, True], [1, 2, 3], "128"], ids=str)
def test_a_block_size_that_is_none_is_refused(bad):
    with pytest.raises(fmoe.AdapterError, match="weight_block_size is"):
        fmoe.adapter("qwen3_moe", {"quantization_config": {"weight_block_size": bad}})
    with pytest.raises(fmoe.AdapterError, match="expected an object"):
        fmoe.adapter("qwen3_moe", {"quantization_config": [1]})


def test_the_block_size_is_where_the_text_model_says_it():
    assert weight_block({"text_config": {"quantization_config": {"weight_block_size": [32, 32]}}}) == (32, 32)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "kimi_k3"])
def test_counts_that_contradict_each_other_are_refused(name):
    told = config(name, 128, 256)
    other = "num_local_experts" if "num_local_experts" not in told else "num_experts"
    with pytest.raises(fmoe.AdapterError, match=f"contradicts itself.*{other} 7"):
        fmoe.adapter(name, told | {other: 7})
    fmoe.adapter(name, told | {other: 3})
