"""Quantised checkpoints of every family: decoded, kept as they are, in memory and in files; what is wrong is named."""

import json
import sys

import pytest
import torch
from codec_cases import CASES, MLP, PLAIN, E, config, fused, made, per_expert
from command import runner
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.checkpoint.stream import flow
from fmoe.codecs.formats import FORMATS, OWN
from fmoe.families import FAMILIES
from fmoe.testing import same

ALL = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]}")
HOW = pytest.mark.parametrize("how", ["decode", "keep"])
UP, DOWN = "experts.gate_and_up_projs", "experts.down_projs"


def files(path):
    return {p.name: p.read_bytes() for p in path.glob("*.safetensors")}


def stacks(params, name):
    return next(t for n, t in params.items() if n.endswith(name))


@HOW
@ALL
def test_the_very_bytes_come_back(case, how):
    adapter, tensors = made(case, quantized=how)
    native = adapter.from_hf(tensors)
    same(adapter.to_hf(native), tensors)
    assert adapter.lossless == (how == "keep")
    opened = fmoe.adapter(case[0], config(case[0], 128, 256), quantized=how)
    same(opened.to_hf(opened.from_hf(tensors)), tensors)
    assert {n: (t.shape, t.dtype) for n, t in native.items()} == dict(adapter.plan(tensors).targets)
    meta = adapter.from_hf({n: t.to("meta") for n, t in tensors.items()})
    assert {n: (t.shape, t.dtype) for n, t in meta.items()} == {n: (t.shape, t.dtype) for n, t in native.items()}
    for experts in (range(0, 1), range(1, 3)):
        part = adapter.from_hf(tensors, e=experts)
        for n, t in part.items():
            cut = "experts." in n and native[n].ndim
            same({n: t}, {n: native[n][experts.start : experts.stop] if cut else native[n]})
        back = adapter.to_hf(part, e=experts)
        for n, t in back.items():
            same({n: t}, {n: tensors[n] if t.shape == tensors[n].shape else tensors[n][experts.start : experts.stop]})


@ALL
def test_stacks_hold_what_the_format_says_of_each_matrix(case):
    adapter, tensors = made(case)
    native, f = adapter.from_hf(tensors), FORMATS[case[1]]
    up, down = stacks(native, UP), stacks(native, DOWN)
    assert up.shape == (E, 128, 512) and down.shape == (E, 256, 128) and up.dtype == torch.bfloat16
    if f.beside == "_scale_inv":  # scales lie as the numbers do
        for name, stack in ((UP, up), (DOWN, down)):
            sides = (f.block[1], f.block[0])
            assert stacks(native, name + "_scale_inv").shape == (
                E,
                *(n // b for n, b in zip(stack.shape[1:], sides, strict=True)),
            )
    if "gate_up_proj" in str(list(tensors)):
        part = lambda n, t: tensors[next(k for k in tensors if n in k and k.endswith(t))]
        ends = (f.weight.partition("}")[2] or "proj", f.scale.partition("}")[2])
        for name, stack in (("gate_up_proj", up), ("down_proj", down)):
            expected = f.decode(*(part(name, t) for t in ends))
            assert torch.equal(stack, expected if f.transposed else expected.mT)
        return
    names = ("w1", "w3", "w2") if any(".w1." in n for n in tensors) else ("gate_proj", "up_proj", "down_proj")
    ends = [t.replace("{S}", "").replace("{X}", ".weight") for t in (f.weight, f.scale)]
    for e in range(E):
        stem = lambda n: next(k for k in tensors if f".experts.{e}.{n}." in k).partition(f".{n}.")[0] + f".{n}"  # noqa: B023
        gate, above, below = (f.decode(*(tensors[stem(n) + t] for t in ends)) for n in names)
        assert torch.equal(up[e], torch.cat([gate, above]).T) and torch.equal(down[e], below.T)


@HOW
@ALL
def test_directories_convert_load_and_verify(case, how, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "SLICE", 20_000)  # so that what can be made in parts is
    monkeypatch.setattr(sys.modules["fmoe.checkpoint.verify"], "MOST", 100_000)
    adapter, tensors = made(case, quantized=how)
    native, choice = adapter.from_hf(tensors), {"quantized": how}
    hf, there, back, part = (tmp_path / n for n in ("hf", "native", "back", "part"))
    save(config(case[0], 128, 256), tensors, hf)
    fmoe.verify(hf, **choice)
    same(fmoe.load(hf, **choice), native)
    fmoe.convert(hf, there, fsync=False, **choice)
    same(load_file(there / "model.safetensors"), native)
    fmoe.verify(there)  # fmoe.json says how it was made
    assert not fmoe.inspect(there)["problems"]
    fmoe.convert(there, back, to="hf", fsync=False)
    assert files(back) == files(hf)
    fmoe.convert(hf, part, e=range(1, 3), fsync=False, **choice)
    some = adapter.from_hf(tensors, e=range(1, 3))
    same(load_file(part / "model.safetensors"), some)
    same(fmoe.load(hf, e=range(1, 3), **choice), some)
    same(fmoe.load(there, e=range(1, 3), **choice), some)
    fmoe.verify(part, **choice)


@pytest.mark.parametrize("name", PLAIN)
def test_a_fresh_export_has_the_published_parts_with_real_scales(name):
    case = next(c for c in CASES if c[0] == name)
    adapter, published = made(case)
    torch.manual_seed(0)
    plain = PLAIN[name](128, 256)
    native = adapter.from_hf(plain)
    exported = adapter.to_hf(native, quantization=True)
    spec = lambda ts: {n: (t.shape, t.dtype) for n, t in ts.items()}
    ours = {n for n in published if "activation" not in n and n != "model.norm.weight"}
    assert spec(exported) == {n: s for n, s in spec(published).items() if n in ours}
    again = adapter.from_hf(exported)
    for n, weight in native.items():
        assert (again[n].float() - weight.float()).abs().max() <= weight.float().abs().max() / 5
    same(adapter.to_hf(again), exported)
    bare = adapter.to_hf(again, quantization=False)
    assert bare.keys() == plain.keys() and {t.dtype for t in bare.values()} <= {torch.bfloat16}
    same(adapter.to_hf({n: again[n] for n in native}, quantization=True), exported)  # without the scales that it had


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


def test_codes_under_a_zero_scale_do_not_pass_verify(tmp_path):
    adapter, tensors = made(("deepseek_v4", "mxfp4 .scale"))
    key = "layers.1.ffn.experts.1.w3.scale"
    tensors[key] = tensors[key].clone()
    tensors[key].view(torch.uint8)[0, 0] = 0
    save(config("deepseek_v4", 128, 256), tensors, tmp_path)
    with pytest.raises(fmoe.AdapterError, match="codes under a scale of 0") as error:
        fmoe.verify(tmp_path)
    assert error.value.keys == (key,)
    fmoe.verify(tmp_path, quantized="keep")
    codes = tensors[key.replace("scale", "weight")].clone()
    codes[0, :16] = 0
    adapter.from_hf(tensors | {key.replace("scale", "weight"): codes})


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
    with pytest.raises(fmoe.AdapterError, match=r"the scale of 'layers.1.attn.wq_a.weight', which is missing") as error:
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


def test_kept_codes_move_between_the_layouts_of_hugging_face(tmp_path):
    adapter, tensors = made(("deepseek_v3", "fp8 blocks"), quantized="keep")
    native = adapter.from_hf(tensors)
    fused_ = (
        adapter
        >> fmoe.adapter("deepseek_v3", config("deepseek_v3", 128, 256), quantized="keep", layout="fused").inverse
    )
    found = fused_.from_hf(tensors)
    up = found[f"{MLP}gate_up_proj"]
    assert up.dtype == torch.float8_e4m3fn and up.shape == (E, 512, 128)
    assert found[f"{MLP}gate_up_proj_scale_inv"].shape == (E, 4, 1)
    same(fused_.to_hf(found), tensors)
    other = fmoe.adapter("deepseek_v3", config("deepseek_v3", 128, 256), quantized="keep").resolve(found)
    same(other.from_hf(found), native)
    decoded = fmoe.adapter("deepseek_v3", config("deepseek_v3", 128, 256))
    same(
        {n: t.contiguous() for n, t in decoded.from_hf(found).items()},
        {n: t.contiguous() for n, t in decoded.from_hf(tensors).items()},
    )
    save(config("deepseek_v3", 128, 256), tensors, tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "fused", to="hf", layout="fused", quantized="keep", fsync=False)
    same(load_file(tmp_path / "fused/model.safetensors"), found)


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


def test_families_list_their_formats_and_every_format_that_is_read_has_a_family():
    told = {n: kind.quantised for n, kind in FAMILIES.items()}
    assert told["deepseek_v4"] == "mxfp4 .scale; mxfp8 .scale, read only; fp8 blocks .scale"
    assert told["gpt_oss"] == "mxfp4 blocks"
    assert told["kimi_k25"] == "int4" and told["granitemoe"] == "fp8 blocks, read only"
    used = {name for kind in FAMILIES.values() for name, _ in kind.fresh}
    assert used == OWN.keys() - {"fp8 qscale"}
    assert {f for _, f in CASES} == used - {"mxfp8 .scale"}


def test_the_command_line_keeps_codes(tmp_path, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    adapter, tensors = made(("gpt_oss", "mxfp4 blocks"), quantized="keep")
    save(config("gpt_oss", 128, 256), tensors, tmp_path / "hf")
    code, out, err = run("convert", tmp_path / "hf", tmp_path / "native", "--quantized", "keep", "--json")
    assert (code, err) == (0, "") and json.loads(out)["made"] == 7
    same(load_file(tmp_path / "native/model.safetensors"), adapter.from_hf(tensors))
    assert run("verify", tmp_path / "hf", "--quantized", "keep", "--quiet")[0] == 0
    assert run("convert", tmp_path / "native", tmp_path / "back", "--to", "hf", "--quantized", "keep")[0] == 0
    assert files(tmp_path / "back") == files(tmp_path / "hf")
    assert run("verify", tmp_path / "hf", "--quantized", "kept")[0] == 1
