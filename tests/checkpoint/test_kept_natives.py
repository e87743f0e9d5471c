"""Native directories of codes (quantized="keep") become whatever the checkpoint that they were made from becomes."""

import json
import re
from pathlib import Path

import pytest
import torch
from codec_cases import CASES, FEW, config, made
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.config import EXPORTS
from fmoe.types import bits

SAYS = {"quant_method": "what", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ALL = pytest.mark.parametrize("case", CASES, ids=" ".join)
HOW = [dict(dtype="bfloat16"), dict(dtype="float32"), dict(dtype="bfloat16", cast="all"), dict(layout="fused")]
HOW += [dict(dtype="bfloat16", layout="fused"), dict(dtype="bfloat16", quantized="decode")]
HOW += [dict(quantize=name) for name in EXPORTS]


def held(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def both(case: tuple[str, str], path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the native directory of its codes."""
    told = config(case[0], 128, 256) | {"torch_dtype": "bfloat16", "quantization_config": SAYS}
    save(told, made(case)[1], path / "hf")
    fmoe.convert(path / "hf", path / "native", quantized="keep", fsync=False)
    return path / "hf", path / "native"


def alike(one: Path, two: Path) -> None:
    was, now = held(one), held(two)
    assert was.keys() == now.keys() and all(torch.equal(bits(t), bits(now[n])) for n, t in was.items())
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()


@ALL
def test_a_native_directory_of_codes_becomes_what_its_source_becomes(case, tmp_path):
    made_of = both(case, tmp_path)
    done = 0
    for i, how in enumerate(HOW):
        outs = [tmp_path / f"{i} of {source.name}" for source in made_of]
        found = []
        for source, out in zip(made_of, outs, strict=True):
            try:
                fmoe.convert(source, out, "hf", fsync=False, **how)
                found.append("")
            except fmoe.AdapterError as error:
                assert not out.exists() and not re.search("quantized='keep' with", str(error))
                found.append("refused")
        assert found[0] == found[1], how
        if found == ["", ""]:
            alike(*outs)
            done += 1
            told = json.loads((outs[1] / "config.json").read_text())
            assert ("quantization_config" in told) == ("dtype" not in how)
    assert done >= 4


@pytest.mark.parametrize(("model_type", "other"), [("qwen3_moe", "mixtral"), ("mixtral", "qwen3_moe")])
@pytest.mark.parametrize("quantize", ["fp8", "mxfp4", "int4"])
def test_another_family_gets_numbers_of_codes_and_never_codes_without_scales(model_type, other, quantize, tmp_path):
    torch.manual_seed(0)
    save(config(model_type, 128, 256) | {"torch_dtype": "bfloat16"}, FEW[model_type](128, 256), tmp_path / "plain")
    fmoe.convert(tmp_path / "plain", tmp_path / "hf", "hf", quantize=quantize, fsync=False)
    fmoe.convert(tmp_path / "hf", tmp_path / "native", quantized="keep", fsync=False)
    for name, how in (("a", {}), ("b", dict(dtype="float32"))):
        outs = [tmp_path / f"{name} of {source}" for source in ("hf", "native")]
        for source, out in zip(("hf", "native"), outs, strict=True):
            fmoe.convert(tmp_path / source, out, other, lossy=True, fsync=False, **how)
        alike(*outs)
        assert all(t.dtype.itemsize > 1 and t.is_floating_point() for t in held(outs[1]).values())
        with pytest.raises(fmoe.AdapterError, match="quantized='keep' with to=.*written in numbers. Fix: leave"):
            fmoe.convert(tmp_path / "hf", tmp_path / "no", other, lossy=True, quantized="keep", fsync=False)


@pytest.mark.parametrize("how", [dict(dtype="bfloat16"), dict(quantized="decode")], ids=str)
def test_where_codes_stay_codes_the_message_names_what_was_asked_and_what_to_do(how, tmp_path):
    hf, native = both(("deepseek_v3", "fp8 blocks"), tmp_path)
    (asked,) = (f"{n}={v!r}" for n, v in how.items())
    calls = [lambda: fmoe.load(native, **how), lambda: fmoe.adapter(native, **how)]
    calls += [lambda: fmoe.convert(native, tmp_path / "out", "automodel", fsync=False, **how)]
    for call in calls:
        with pytest.raises(fmoe.AdapterError, match="was made with quantized='keep', and holds codes") as error:
            call()
        assert asked in str(error.value) and f"fmoe convert {native} HF --to hf --dtype bfloat16" in str(error.value)
    fmoe.convert(native, tmp_path / "HF", "hf", dtype="bfloat16", fsync=False)  # the fix
    was, now = fmoe.load(hf, dtype="bfloat16"), fmoe.load(tmp_path / "HF")
    assert all(torch.equal(t, was[n]) for n, t in now.items())
    with pytest.raises(fmoe.AdapterError, match="expected one of both"):
        fmoe.convert(native, tmp_path / "out", "hf", quantized="keep", dtype="bfloat16", fsync=False)


def test_a_directory_that_was_made_so_and_holds_no_codes_is_cast_as_any(tmp_path):
    torch.manual_seed(0)
    save(config("qwen3_moe", 128, 256) | {"torch_dtype": "bfloat16"}, FEW["qwen3_moe"](128, 256), tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "native", quantized="keep", fsync=False)
    assert {t.dtype for t in fmoe.load(tmp_path / "native", dtype="float32").values()} == {torch.float32}
