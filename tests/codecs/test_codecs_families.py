"""Quantised checkpoints of every family: decoded, kept as they are, and exported afresh."""

import json
import sys

import pytest
import torch
from codec_cases import CASES, MLP, PLAIN, E, config, made
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
    told = config("gpt_oss", 128, 256) | {"quantization_config": {"quant_method": "mxfp4"}}
    save(told, tensors, tmp_path / "hf")
    code, out, err = run("convert", tmp_path / "hf", tmp_path / "native", "--quantized", "keep", "--json")
    assert (code, err) == (0, "") and json.loads(out)["made"] == 7
    same(load_file(tmp_path / "native/model.safetensors"), adapter.from_hf(tensors))
    assert run("verify", tmp_path / "hf", "--quantized", "keep", "--quiet")[0] == 0
    assert run("convert", tmp_path / "native", tmp_path / "back", "--to", "hf", "--quantized", "keep")[0] == 0
    assert files(tmp_path / "back") == files(tmp_path / "hf")
    assert run("verify", tmp_path / "hf", "--quantized", "kept")[0] == 1
