"""What a quantization_config says of modules by name is read, true of the tensors, and true of what is written."""

import json
import re
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from codec_cases import PROJ, config, per_expert
from foreign_cases import E, checkpoint, parts
from hf import save
from hypothesis import given
from hypothesis import strategies as st

import fmoe
from fmoe.codecs.config import QUANT
from fmoe.codecs.foreign.modules import PATTERN, Modules
from fmoe.testing import same

X = "model.layers.0.mlp.experts"
UP = f"{X}.1.up_proj"
LINEAR = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}
group = lambda **more: {"config_groups": {"group_0": LINEAR | more}}
OTHERS = ("lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "*router*", f"{X}.1.up", "model.layers.1")
WRONG = {
    **{field: {field: [*OTHERS, UP]} for field in ("modules_to_not_convert", "ignored_layers", "exclude")},
    "ignore, a pattern": group() | {"ignore": ["re:.*up_proj"]},
    "ignore, all experts": group() | {"ignore": [X]},
    "ignore, a glob": {"exclude_modules": ["*experts.1.*"]},
    "a group's ignore": group(ignore=["re:.*up_proj$"]),
    "a group's targets": group(targets=[r"re:.*\.(gate|down)_proj$"]),
    "a group's targets by name": group(
        targets=[f"{X}.{e}.{n}" for e in range(E) for n in PROJ if (e, n) != (1, PROJ[1])]
    ),
}
RIGHT = {
    "others": group() | {"ignore": list(OTHERS)},
    "a group's": group(ignore=list(OTHERS), targets=["re:.*experts.*"]),
    "by another group": {
        "config_groups": {"a": LINEAR | {"ignore": ["re:.*up_proj"]}, "b": LINEAR | {"targets": ["re:.*up_proj"]}}
    },
}


@pytest.mark.parametrize("how", ["decode", "keep"])
@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4 packed"])
def test_a_list_that_the_tensors_contradict_is_refused_by_name_and_any_other_is_no_matter(fmt: str, how: str) -> None:
    told, hf, _ = checkpoint("qwen3_moe", fmt)
    method = "modelopt" if fmt == "nvfp4" else "compressed-tensors"
    adapter = lambda said: fmoe.adapter(
        "qwen3_moe", told | {"quantization_config": {"quant_method": method} | said}, quantized=how
    )
    for said in RIGHT.values():
        same(adapter(said).to_hf(adapter(said).from_hf(hf)), hf)
    for what, said in WRONG.items():
        with pytest.raises(fmoe.AdapterError, match=r"quantization_config (names it in|has no group)") as error:
            adapter(said).from_hf(hf)
        assert any(key.startswith(UP) for key in error.value.keys), what


@pytest.mark.parametrize("field", ["ignore", "exclude_modules"])
@pytest.mark.parametrize("bad", ["lm_head", [1], ["re:("]], ids=str)
def test_what_is_no_list_of_names_is_refused(field: str, bad: object) -> None:
    for said in ({field: bad}, group(ignore=bad), group(targets=bad)):
        with pytest.raises(fmoe.AdapterError, match="expected a list of module names"):
            fmoe.adapter("qwen3_moe", {"quantization_config": {"quant_method": "modelopt"} | said})


def modelopt(path: Path, *excluded: str, said: bool) -> dict[str, torch.Tensor]:
    """A directory of ModelOpt's: its own file says how it is quantised, and config.json perhaps too."""
    told, hf, _ = checkpoint("qwen3_moe", "nvfp4")
    hf |= {"lm_head.weight": torch.ones(8, 32).bfloat16()}
    told.pop("quantization_config")
    save(
        told | ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}} if said else {}), hf, path
    )
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": [*excluded]}}
    (path / QUANT).write_text(json.dumps(own))
    return hf


@pytest.mark.parametrize("said", [False, True], ids=["alone", "beside config.json"])
def test_modelopts_own_file_is_read_and_goes_along_while_it_is_true(said: bool, tmp_path: Path) -> None:
    modelopt(tmp_path / "hf", "lm_head", "*.mlp.gate*", said=said)
    assert fmoe.adapter(tmp_path / "hf").config["quantization_config"]["exclude_modules"] == ["lm_head", "*.mlp.gate*"]
    fmoe.convert(tmp_path / "hf", tmp_path / "native", quantized="keep", fsync=False)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    for name in ("config.json", QUANT, "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    report = fmoe.convert(tmp_path / "hf", tmp_path / "plain", "hf", dtype="bfloat16", fsync=False)
    assert not (tmp_path / "plain" / QUANT).exists() and any(QUANT in note for note in report.notes)
    assert "quantization" not in (tmp_path / "plain" / "config.json").read_text()
    native, adapter = fmoe.load(tmp_path / "hf"), fmoe.adapter(tmp_path / "hf")
    for force in (True, False):  # over the model, and where its config alone is left
        fmoe.save(native, tmp_path / "hf", adapter, quantization=False, force=force, fsync=False)
        assert not (tmp_path / "hf" / QUANT).exists()
        assert "quantization" not in fmoe.adapter(tmp_path / "hf").config
        (tmp_path / "hf" / "model.safetensors").unlink()
        (tmp_path / "hf" / QUANT).write_bytes((tmp_path / "back" / QUANT).read_bytes())
    modelopt(tmp_path / "wrong", "*experts.1*", said=said)
    for call in (fmoe.load, fmoe.verify, lambda p: fmoe.load(p, quantized="keep")):
        with pytest.raises(fmoe.AdapterError, match=r"in nvfp4, and quantization_config names it in '\*experts.1\*'"):
            call(tmp_path / "wrong")


def written(told: dict, hf: dict, path: Path, **how: str) -> dict:
    """The quantization_config of what is saved in another layout, its codes as they were."""
    save(told, hf, path / "hf")
    native = fmoe.load(path / "hf", quantized="keep")
    fmoe.save(native, path / "out", fmoe.adapter("qwen3_5_moe_text", told, quantized="keep", **how), fsync=False)
    same(fmoe.load(path / "out", quantized="keep"), native)  # which its lists do not contradict
    return json.loads((path / "out" / "config.json").read_text())["quantization_config"]


def test_lists_are_true_of_the_names_that_are_written_fused_or_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "qwen3_5_moe_text"
    plain = per_expert("model.layers.2.mlp.experts.", None, PROJ, 128, 128)
    hf = per_expert("model.layers.1.mlp.experts.", "fp8 blocks", PROJ, 128, 128) | plain
    each = [n.removesuffix(".weight") for n in plain]
    told = config(name, 128, 128)
    told["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", *each]}
    found = written(told, hf, tmp_path / "one", layout="fused")["modules_to_not_convert"]
    stacks = [f"model.layers.2.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]
    assert found[0] == "lm_head" and set(stacks) <= set(found) and "model.layers.1.mlp.experts.down_proj" not in found
    fused = fmoe.adapter(name, told, quantized="keep", layout="fused")
    hf = fused.to_hf(fmoe.load(tmp_path / "one" / "hf", quantized="keep"))
    told["quantization_config"]["modules_to_not_convert"] = stacks
    back = written(told, hf, tmp_path / "two", layout="per_expert")["modules_to_not_convert"]
    assert set(each) <= set(back) and not any("layers.1" in n for n in back)


@pytest.mark.parametrize("fmt", ["fp8 blocks", "mxfp4 packed", "int4 pack", "nvfp4"])
def test_layers_that_are_left_plain_stand_beside_kept_ones(fmt: str) -> None:
    told, hf, _ = checkpoint("qwen3_moe", fmt)
    plain = per_expert("model.layers.1.mlp.experts.", None, PROJ, 32, 128)
    told["quantization_config"] |= {"ignore": ["re:.*layers\\.1\\..*"]}
    for how in ("decode", "keep"):
        adapter = fmoe.adapter("qwen3_moe", told, quantized=how)
        native = adapter.from_hf(hf | plain)
        assert native["model.layers.1.mlp.experts.down_projs"].dtype == torch.bfloat16
        same(adapter.to_hf(native), hf | plain)
    short = {n: t[:, :16] if "down" not in n else t for n, t in plain.items()}
    with pytest.raises(fmoe.AdapterError, match="expected|but 32 at"):
        fmoe.adapter("qwen3_moe", told).from_hf(hf | short)


def test_groups_say_how_many_bits_words_hold() -> None:
    told, hf, said = checkpoint("qwen3_moe", "int4 pack")
    for e in range(E):
        made, said[f"{e}.down_proj"] = parts("int8 pack", f"{X}.{e}.down_proj.weight", torch.randn(32, 128), 32)
        hf |= made
    groups = {str(b): {"targets": [t], "weights": {"num_bits": b}} for b, t in ((4, "Linear"), (8, "re:.*down_proj"))}
    told["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": groups}
    told["quantization_config"]["format"] = "mixed-precision"
    for how in ("decode", "keep"):
        adapter = fmoe.adapter("qwen3_moe", told, quantized=how)
        native = adapter.from_hf(hf)
        same(adapter.to_hf(native), hf)
        down = native[f"{X}.down_projs"]
        assert how == "keep" or all(torch.equal(down[e], said[f"{e}.down_proj"].T.float()) for e in range(E))
    told["quantization_config"]["config_groups"]["8"]["format"] = "marlin-24"
    odd = {n: t for n, t in hf.items() if not n.endswith("down_proj.weight_scale")}
    with pytest.raises(fmoe.AdapterError, match="says compressed-tensors marlin-24, a format that"):
        fmoe.adapter("qwen3_moe", told).from_hf(odd)


def test_several_kinds_of_weights_in_one_layer_are_read_run_and_written_as_groups(tmp_path: Path) -> None:
    told, hf, _ = checkpoint("qwen3_moe", "nvfp4 packed")
    hf = {n: t for n, t in hf.items() if ".down_proj." not in n}
    for e in range(E):
        hf |= parts("fp8 side channel", f"{X}.{e}.down_proj.weight", torch.randn(32, 128), 32)[0]
    bare = {n: v for n, v in told.items() if n != "quantization_config"} | {"hidden_act": "silu"}
    save(bare, hf, tmp_path / "hf")
    fmoe.save(fmoe.load(tmp_path / "hf"), tmp_path / "out", fmoe.adapter(tmp_path / "hf"), fsync=False)
    made = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kinds = {g["format"]: (g["targets"], g["weights"]["num_bits"]) for g in made["config_groups"].values()}
    assert made["format"] == "mixed-precision" and [b for _, b in kinds.values()] == [8, 4]
    assert kinds["float-quantized"][0] == [f"{X}.{e}.down_proj" for e in range(E)]
    kept, decoded = fmoe.load(tmp_path / "out", quantized="keep"), fmoe.load(tmp_path / "out")
    x, routing = torch.randn(5, 32), fmoe.Routing(torch.arange(5).view(5, 1) % E, torch.ones(5, 1))
    y = [fmoe.experts(fmoe.subtree(p, X), x, routing, fmoe.adapter(tmp_path / "hf").moe_config)
         for p in (kept, {n: t for n, t in decoded.items() if n.endswith("_projs")})]  # fmt: skip
    assert torch.equal(*y) and y[0].any()


MODULES = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map(".".join)
PATTERNS = st.lists(st.sampled_from(["a", "b", ".", "*", "?", "[ab]"]), min_size=1, max_size=4).map("".join)


def compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


@given(st.lists(st.tuples(st.sampled_from(["", PATTERN]), PATTERNS).map("".join), max_size=3), st.lists(MODULES))
def test_a_pattern_is_of_modules_and_what_is_in_them_or_a_glob_or_an_expression(made, modules):
    patterns = tuple(p for p in made if not p.startswith(PATTERN) or compiles(p.removeprefix(PATTERN)))

    def takes(p: str, module: str) -> bool:
        if p.startswith(PATTERN):
            return re.match(p.removeprefix(PATTERN), module) is not None
        inside = module == p or module.startswith(f"{p}.") or module.endswith(f".{p}")
        return inside or fnmatchcase(module, p)

    found = Modules(patterns)
    for module in modules:
        mine = [p for p in patterns if takes(p, module)]
        assert found.first(f"{module}.weight") in (mine or [None])
    assert found.idle(modules) == [p for p in patterns if not any(takes(p, m) for m in modules)]


def test_a_hundred_times_the_patterns_do_not_take_a_hundred_times_as_long():
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(300)]

    def took(layers: int) -> float:
        found, times = Modules(tuple(f"model.layers.{n}.self_attn.{p}_proj" for n in range(layers) for p in "qk")), []
        for _ in range(5):
            start = time.process_time()
            assert not any(map(found.first, names))
            times.append(time.process_time() - start)
        return min(times)

    assert took(1000) < 10 * took(10)
