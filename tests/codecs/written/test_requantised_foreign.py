"""What any tool quantised, as its config says it, becomes other codes with the config and numbers of plain weights."""

import json
import re
from typing import Any

import foreign_cases
import pytest
import stack_cases
import torch
from hf import save
from safetensors.torch import load_file

import fmoe
from fmoe.codecs.config import EXPORTS
from fmoe.types import bits

CT = dict(quant_method="compressed-tensors", quantization_status="compressed", ignore=["lm_head"])
FP8 = dict(quant_method="fp8", activation_scheme="dynamic")
MODELOPT = dict(quant_method="modelopt", ignore=["lm_head"])


def group(form: str, head: str | None, width: int, kind: str = "int", of: int = 32, **more: Any) -> dict[str, Any]:
    how = dict(num_bits=width, type=kind, symmetric=True, strategy="group", group_size=of, dynamic=False) | more
    one = dict(targets=["Linear"], weights=how, format=form, input_activations=None, output_activations=None)
    return CT | {"config_groups": {"group_0": one}} | ({"format": head} if head else {})


PACK, NV, MIXED = "pack-quantized", "nvfp4-pack-quantized", "mixed-precision"
SAID = {
    "int8 pack": [group(PACK, PACK, 8), group(PACK, MIXED, 8)],
    "int4 pack": [group(PACK, PACK, 4), group(PACK, MIXED, 4), group(PACK, PACK, 4, of=64)],
    "int4 pack zeros": [group(PACK, PACK, 4, symmetric=False)],
    "int8 pack zeros": [group(PACK, MIXED, 8, symmetric=False)],
    "nvfp4 packed": [group(NV, head, 4, "float", 16, strategy="tensor_group") for head in (NV, MIXED, None)],
    "fp8 side tensor": [
        FP8 | dict(activation_scheme="static", weight_block_size=None),
        MODELOPT | {"quant_algo": "FP8"},
    ],
    "fp8 side channel": [FP8, dict(quant_method="fbgemm_fp8", activation_scale_ub=1200.0)],
    "fp8 blocks": [FP8 | {"weight_block_size": [128, 128]}],
    "mxfp8": [FP8 | {"weight_block_size": [1, 32]}, dict(quant_method="mxfp8")],
    "nvfp4": [MODELOPT | {"quant_algo": algo, "group_size": 16} for algo in ("NVFP4", "MIXED_PRECISION")],
    "mxfp4 side": [MODELOPT | {"quant_algo": "MXFP4"}, dict(quant_method="quark", exclude=["lm_head"])],
    "mxfp8 side": [MODELOPT | {"quant_algo": "MXFP8"}],
}
"""Format -> what tools say of it; of others, what the cases do."""
ROWS = [(fmt, i) for fmt in foreign_cases.READ for i in range(len(SAID.get(fmt, [None])))]
STAY = {"fp8": {"fp8 blocks"}, "mxfp8": {"mxfp8"}, "mxfp4": {"mxfp4 packed"}, "int4": {"int4 pack", "int4"}}
STAY |= {"nvfp4": {"nvfp4 packed"}}
"""What is written -> the formats of which the codes stay as they are."""


def held(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("fmt", "i", "quantize"),
    [
        (*row, q) if k % 5 == j else pytest.param(*row, q, marks=pytest.mark.thorough)
        for k, row in enumerate(ROWS)
        for j, q in enumerate(EXPORTS)
    ],
)
def test_the_config_speaks_of_what_is_written_whatever_it_said(fmt, i, quantize, tmp_path, monkeypatch):
    said = SAID.get(fmt, [None])[i]
    of = said["config_groups"]["group_0"]["weights"]["group_size"] if said and "config_groups" in said else 32
    monkeypatch.setattr(foreign_cases, "D", 2 * of)
    config, tensors, _ = foreign_cases.checkpoint("qwen3_moe", fmt, of)
    dtype = "float32" if "zeros" in fmt or "int8" in fmt else "bfloat16"
    config |= {"torch_dtype": dtype} | ({"quantization_config": said} if said else {})
    save(config, tensors, tmp_path / "hf")
    notes = {}
    fmoe.convert(tmp_path / "hf", tmp_path / "plain", "hf", dtype=dtype, fsync=False)
    fmoe.convert(tmp_path / "hf", tmp_path / "native", quantized="keep", fsync=False)
    for source, path in (("hf", "codes"), ("plain", "fresh"), ("codes", "again"), ("native", "via")):
        notes[path] = fmoe.convert(tmp_path / source, tmp_path / path, "hf", quantize=quantize, fsync=False).notes
    fmoe.verify(tmp_path / "codes")
    first, again, read = (
        held(tmp_path / "codes"),
        held(tmp_path / "again"),
        lambda name: json.loads((tmp_path / name / "config.json").read_text())["quantization_config"],
    )
    assert first.keys() == again.keys() and all(torch.equal(bits(first[n]), bits(t)) for n, t in again.items())
    assert read("via") == read("codes") and notes["via"] == notes["codes"]
    if fmt in STAY[quantize]:
        assert all(torch.equal(bits(first[n]), bits(t)) for n, t in tensors.items() if "input_scale" not in n)
        assert read("codes") == said or said is None or said.get("format") is None
    else:
        assert read("codes") == read("fresh")
        assert first.keys() == held(tmp_path / "fresh").keys()


@pytest.mark.parametrize(("fmt", "family"), stack_cases.PAIRS)
@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, *({"quantize": q} for q in EXPORTS)], ids=str)
def test_stacks_of_codes_become_numbers_or_other_codes_in_every_layout(how, fmt, family, tmp_path):
    config, tensors, _ = stack_cases.checkpoint(family, fmt)
    save(config, tensors, tmp_path / "hf")
    native = fmoe.load(tmp_path / "hf")
    for layout in ("same", "fused", "per_expert"):
        asked = how if layout == "same" else how | {"layout": layout}
        try:
            fmoe.convert(tmp_path / "hf", tmp_path / layout, "hf", fsync=False, **asked)
        except fmoe.AdapterError as error:
            assert re.search("no choice 'layout'|expected one of 'inter|have no form in", str(error)), error
            assert not re.search("_(stack|activation)", str(error).partition(": fused")[0]), error
            continue
        fmoe.verify(tmp_path / layout)
        now = fmoe.load(tmp_path / layout)
        for n in (n for n in native if n.endswith("_projs")):
            off = float((now[n].double() - native[n].double()).norm() / native[n].double().norm())
            assert off <= (0.2 if how.get("quantize", "fp8")[-1] == "4" else 0.05 if "quantize" in how else 2**-8)
        if "dtype" in how:
            assert not any("scale" in n for n in held(tmp_path / layout))
