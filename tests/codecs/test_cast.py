"""`load(dtype=)` casts experts; with cast="all" the rest too, and never what has to stay as it is."""

import json

import hf
import hf_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.codecs.config import EXPORTS
from fmoe.types import EXPERT_TENSORS

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen3_next"]
KEPT = ("e_score_correction_bias", "A_log", "dt_bias")
half, full = torch.float16, torch.float32


def stays(name: str) -> bool:
    return any(part in name for part in KEPT)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_casts_the_rest_but_what_is_kept_in_fp32(name, native, tmp_path):
    _, path = zoo.saved(name)
    if native:
        fmoe.convert(path, tmp_path / "native", fsync=False)
        path = tmp_path / "native"
    plain, experts, whole = (fmoe.load(path, **how) for how in ({}, dict(dtype=half), dict(dtype=half, cast="all")))
    assert plain.keys() == experts.keys() == whole.keys() and any(map(stays, plain)) == (name in FAMILIES[2:])
    for n, t in plain.items():
        of_experts = n.rpartition(".")[2] in EXPERT_TENSORS
        assert experts[n].dtype == (half if of_experts else t.dtype), n
        assert whole[n].dtype == (t.dtype if stays(n) else half) and torch.equal(whole[n], t.to(whole[n].dtype)), n
    out = {n: torch.empty_like(t) for n, t in whole.items()}
    assert all(torch.equal(t, whole[n]) for n, t in fmoe.load(path, out=out, dtype=half, cast="all").items())


def test_what_a_narrow_checkpoint_stores_in_fp32_stays(tmp_path):
    model = hf.build("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"] = held["model.norm.weight"].float()
    save_file(held, file, {"format": "pt"})
    whole = fmoe.load(tmp_path, dtype=half, cast="all")
    assert {n for n, t in whole.items() if t.dtype == full} == {"model.norm.weight"}
    assert {t.dtype for t in whole.values()} == {half, full}


def test_scales_stay_with_what_was_decoded(tmp_path):
    _, path = zoo.saved("deepseek_v3")
    fmoe.convert(path, tmp_path / "fp8", "hf", quantize="fp8", fsync=False)
    plain = fmoe.load(tmp_path / "fp8")
    whole = fmoe.load(tmp_path / "fp8", dtype=half, cast="all")
    scales = {n for n in plain if n.endswith("_scale_inv")}
    assert scales and all(torch.equal(plain[n], whole[n]) and whole[n].dtype == plain[n].dtype for n in scales)
    assert {t.dtype for n, t in whole.items() if n not in scales and not stays(n)} == {half}


@pytest.mark.parametrize("how, why", [
    (dict(cast="all"), "no dtype= says to which. Fix: dtype='bfloat16'"),
    (dict(cast="alll", dtype=half), "cast='alll': expected 'experts' or 'all'. Did you mean 'all'?"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(how, why):
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.load(zoo.saved("mixtral")[1], **how)
    assert why in str(error.value)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "olmoe"])
def test_a_live_state_dict_is_understood_or_the_error_says_how(name):
    model, path = zoo.saved(name)
    live = model.state_dict()
    native = fmoe.adapter(name, model.config).from_hf(live)
    same = fmoe.load(path)
    assert all(torch.equal(t, same[n]) for n, t in native.items() if n in same) and native.keys() >= same.keys()
    with pytest.raises(fmoe.AdapterError, match='as Transformers holds them in memory. Fix: layout="fused"'):
        fmoe.adapter(path).from_hf(live)
    fixed = fmoe.adapter(path, layout="fused").from_hf(live)
    assert fixed.keys() == native.keys() and all(torch.equal(t, native[n]) for n, t in fixed.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversion_casts_all_if_asked_and_else_names_what_is_not_what_its_config_says(name, tmp_path):
    _, path = zoo.saved(name)
    some, whole = (
        fmoe.convert(path, tmp_path / n, "hf", dtype="bfloat16", fsync=False, **how)
        for n, how in (("some", {}), ("whole", dict(cast="all")))
    )
    assert "lm_head.weight" in next(n for n in some.notes if "cast='all'" in n)
    assert not any("cast='all'" in n for n in whole.notes)
    for to in ("native", "automodel"):
        notes = fmoe.convert(path, tmp_path / to, to, dtype="bfloat16", dry_run=True).notes
        (note,) = (n for n in notes if f"cast='all' (--cast all), and that to {to!r}" in n)
        assert "experts are bfloat16, and " in note and "lm_head.weight" in note
    before, after = (
        {n: t for f in p.glob("*.safetensors") for n, t in load_file(f).items()} for p in (path, tmp_path / "whole")
    )
    assert before.keys() == after.keys()
    for n, t in before.items():
        assert torch.equal(after[n], t if stays(n) else t.bfloat16()), n
    fmoe.verify(tmp_path / "whole")
    with pytest.raises(fmoe.AdapterError, match="cast='all'"):
        fmoe.convert(path, tmp_path / "native", cast="all", dtype="bfloat16")
    fmoe.convert(path, tmp_path / "kept", quantized="keep", fsync=False)  # of a source without codes
    notes = fmoe.convert(tmp_path / "kept", tmp_path / "back", "hf", dtype="bfloat16", fsync=False).notes
    assert any("Fix: to='hf' first, and that with dtype= and cast='all'" in n for n in notes)
    same_bits(tmp_path / "back", tmp_path / "some")
    with pytest.raises(fmoe.AdapterError, match="expected 'experts' or 'all'"):
        fmoe.convert(path, tmp_path / "other", "hf", cast="al", dtype="bfloat16")


def same_bits(a, b):
    one, other = ({n: t for f in p.glob("*.safetensors") for n, t in load_file(f).items()} for p in (a, b))
    assert one.keys() == other.keys() and all(
        torch.equal(t, other[n]) and t.dtype == other[n].dtype for n, t in one.items()
    )


def test_a_dtype_for_experts_is_refused_where_there_are_none(tmp_path):
    """It would be said in config.json alone, and Transformers would round everything."""
    config = {"model_type": "qwen3_moe", "num_experts": 0, "num_hidden_layers": 1, "dtype": "float32"}
    params = {"model.layers.0.mlp.down_proj.weight": torch.ones(2, 3), "model.norm.weight": torch.ones(2)}
    fmoe.save(params, tmp_path / "hf", fmoe.adapter("qwen3_moe", config), fsync=False)
    with pytest.raises(fmoe.AdapterError, match="casts experts, and there are none"):
        fmoe.convert(tmp_path / "hf", tmp_path / "out", "hf", dtype="bfloat16", fsync=False)
    fmoe.convert(tmp_path / "hf", tmp_path / "all", "hf", dtype="bfloat16", cast="all", fsync=False)
    assert {t.dtype for t in fmoe.load(tmp_path / "all").values()} == {torch.bfloat16}


@pytest.mark.parametrize("quantize", EXPORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, half, torch.float32])
def test_a_dtype_beside_codes_is_that_of_the_rest_and_for_experts_alone_refused(dtype, quantize, tmp_path):
    """Scales are no experts: float32 beside float32 scales was said by config.json, and nothing was cast."""
    path, how = tmp_path / "hf", dict(quantize=quantize, dtype=dtype, fsync=False)
    hf.build("qwen3_moe", hidden_size=64, moe_intermediate_size=64).bfloat16().save_pretrained(path)
    fmoe.convert(path, tmp_path / "native", fsync=False)
    told = f"{str(dtype).removeprefix('torch.')!r} casts experts, and they are in codes. Fix: without dtype, or, from"
    for n, source in enumerate((path, tmp_path / "native")):
        if dtype == torch.bfloat16:
            notes = fmoe.convert(source, tmp_path / str(n), "hf", **how).notes
            assert ["weight_global_scale" in note for note in notes] == [True] * (quantize == "nvfp4")
            continue
        with pytest.raises(fmoe.AdapterError, match=told):
            fmoe.convert(source, tmp_path / str(n), "hf", **how)
    made = fmoe.convert(path, tmp_path / "all", "hf", cast="all", **how)
    assert not any("cast" in note for note in made.notes)
    files = {n: t for f in (tmp_path / "all").glob("*.safetensors") for n, t in load_file(f).items()}
    plain = [t for n, t in files.items() if n.endswith(("norm.weight", "embed_tokens.weight", "gate.weight"))]
    assert plain and {t.dtype for t in plain} == {dtype}
    assert json.loads((tmp_path / "all" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


CALLS = {
    "load": lambda path, out: fmoe.load(path, dtype=half),
    "adapter": lambda path, out: fmoe.adapter(path, dtype=half).from_hf(load_file(path / "model.safetensors")),
    "convert": lambda path, out: fmoe.convert(path, out, dtype=half),
    "to hf": lambda path, out: fmoe.convert(path, out, "hf", dtype=half),
    "native": lambda path, out: fmoe.load(fmoe.convert(path, out).path, dtype=half),
    "all": lambda path, out: fmoe.load(path, dtype=half, cast="all"),
}


@pytest.mark.parametrize("lost", ["expert", "half of an expert", "norm"])
@pytest.mark.parametrize("call", CALLS)
def test_a_tensor_of_which_nothing_is_left_is_refused_and_rounding_is_not(call, lost, tmp_path):
    config, block = {"model_type": "per_expert", "num_experts": 2}, "model.layers.0.mlp.experts"
    sizes = {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}
    tensors = {f"{block}.{e}.{n}.weight": torch.ones(size) for e in (0, 1) for n, size in sizes.items()}
    tensors["model.norm.weight"] = torch.ones(4)
    name = "model.norm.weight" if lost == "norm" else f"{block}.1.down_proj.weight"
    tensors[name] *= 1e-9
    if lost == "half of an expert":
        tensors[name][-1] = 1.0
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    if lost == "expert" or lost == "norm" and call == "all":
        with pytest.raises(fmoe.AdapterError, match="(norm|down_proj).* holds 1e-09 at most, and is 0 in float16") as e:
            CALLS[call](tmp_path / "hf", tmp_path / "out")
        assert e.value.keys
    else:
        CALLS[call](tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_vl_moe", "llama4", "ernie4_5_vl_moe"])
def test_every_part_of_a_config_says_the_dtype_that_all_were_cast_to(name, tmp_path):
    """A tower's too: Transformers wrote what each part was in."""
    path = zoo.saved(name)[1]
    fmoe.convert(path, tmp_path / "half", "hf", dtype="float16", cast="all", fsync=False)
    parts, said = [json.loads((tmp_path / "half" / "config.json").read_text())], set()
    while parts:
        part = parts.pop()
        said |= {part[f] for f in ("dtype", "torch_dtype") if part.get(f)}
        parts += [v for v in part.values() if isinstance(v, dict)]
    assert said == {"float16"}


def test_cast_all_of_decoded_natives_says_which_way_leads_there(tmp_path):
    path = zoo.saved("qwen3_moe")[1]
    fmoe.convert(path, tmp_path / "native", fsync=False)
    with pytest.raises(fmoe.AdapterError, match="Fix: to='hf' first, and that with both"):
        fmoe.convert(tmp_path / "native", tmp_path / "hf", "hf", dtype="float16", cast="all")
    fmoe.convert(tmp_path / "native", tmp_path / "first", "hf", fsync=False)
    fmoe.convert(tmp_path / "first", tmp_path / "hf", "hf", dtype="float16", cast="all", fsync=False)
