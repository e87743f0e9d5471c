"""A native directory holds what it was made with: its dtypes come back unasked, and those asked for come back too."""

import json
import os

import pytest
import tiny
import torch
from codec_cases import CASES, config, made
from safetensors.torch import save_file

import fmoe
from fmoe.testing import same

full = torch.float32


@pytest.mark.parametrize("case", CASES)
def test_what_was_decoded_wider_is_loaded_as_it_lies(case, tmp_path):
    _, tensors = made(case, D=128, I=128)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    rules = fmoe.families.family(case[0]).adapter(config(case[0], 128, 128), dtype=full)
    wide = rules.resolve(tensors).from_hf(tensors)
    assert full in {t.dtype for n, t in wide.items() if n.endswith("_projs")}
    (tmp_path / "hf/config.json").write_text(json.dumps(config(case[0], 128, 128)))
    fmoe.save(wide, tmp_path / "native", rules.resolve(tensors), layout="native", fsync=False)
    same(fmoe.load(tmp_path / "native"), wide)
    out = {n: torch.empty_like(t) for n, t in wide.items()}
    same(fmoe.load(tmp_path / "native", out=out), wide)
    narrow = fmoe.load(tmp_path / "native", dtype="bfloat16")
    assert all(t.dtype == torch.bfloat16 for n, t in narrow.items() if n.endswith("_projs"))


WIDER = [(base, dtype) for base in ("qwen3_moe", "fused", "fp8") for dtype in ("float32", full)] + [("fp8", "float16")]


@pytest.mark.parametrize("base, dtype", WIDER)
def test_a_conversion_keeps_its_dtype_in_fmoe_json(base, dtype, tmp_path):
    source = tiny.lay(tiny.bases()[base], tmp_path / "source")
    wide = fmoe.load(source, dtype=dtype)
    fmoe.convert(source, tmp_path / "native", dtype=dtype, fsync=False)
    same(fmoe.load(tmp_path / "native"), wide)
    fmoe.verify(tmp_path / "native")
    assert not fmoe.inspect(tmp_path / "native")["problems"]
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    if base == "fp8":
        assert (tmp_path / "back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_part_is_loaded_in_the_dtype_that_is_asked_for(tmp_path):
    source = tiny.lay(tiny.bases()["qwen3_moe"], tmp_path / "source")
    fmoe.convert(source, tmp_path / "part", e=range(1, 3), fsync=False)
    same(fmoe.load(tmp_path / "part", dtype=full), fmoe.load(source, dtype=full, e=range(1, 3)))
    same(fmoe.load(tmp_path / "part"), fmoe.load(source, e=range(1, 3)))


def test_a_range_of_no_expert_is_never_a_directory(tmp_path):
    source = tiny.lay(tiny.bases()["qwen3_moe"], tmp_path / "source")
    with pytest.raises(fmoe.AdapterError, match=r"e=range\(2, 2\): expected a range of one or more"):
        fmoe.convert(source, tmp_path / "native", e=range(2, 2))
    params = fmoe.load(source, e=range(2, 2))
    with pytest.raises(fmoe.AdapterError, match="expected a range of one or more"):
        fmoe.save(params, tmp_path / "native", fmoe.adapter(source), layout="native", e=range(2, 2))
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("to, how", [("native", {}), ("hf", dict(layout="fused"))])
def test_a_journal_that_is_also_another_file_is_not_written_to(to, how, tmp_path):
    source = tiny.lay(tiny.bases()["qwen3_moe"], tmp_path / "source")
    before = (source / "config.json").read_bytes()
    (tmp_path / "dst").mkdir()
    os.link(source / "config.json", tmp_path / "dst/fmoe.journal")
    with pytest.raises(fmoe.AdapterError, match="journal"):
        fmoe.convert(source, tmp_path / "dst", to, force=True, fsync=False, **how)
    assert (source / "config.json").read_bytes() == before


def test_a_scalar_is_cast_with_the_rest(tmp_path):
    source = tiny.lay(tiny.bases()["qwen3_moe"], tmp_path / "source")
    for part in ({}, {"e": range(1, 3)}):
        wide = fmoe.load(source, dtype=full, cast="all", **part)
        assert wide["model.scalar"].dtype == full and not wide["model.scalar"].shape
    fmoe.convert(source, tmp_path / "wide", "hf", dtype="float32", cast="all", fsync=False)
    same(fmoe.load(tmp_path / "wide"), fmoe.load(source, dtype=full, cast="all"))
