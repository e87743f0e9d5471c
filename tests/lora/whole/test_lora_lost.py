"""What is lost of an adapter that PEFT wrote is missed by name, whatever tells of its base."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import FILE, LAYERS, WARNS, longer, modules, parameters, trained
from safetensors.torch import save_file

import fmoe

pytestmark = WARNS
HYBRID = pytest.mark.parametrize("name", LAYERS)
BASES = ("directory", "adapter", "type")


def bases(name: str, adapter: fmoe.Adapter, path: Path) -> dict[str, tuple[Any, ...]]:
    """Each way to say which model an adapter is for."""
    model = longer(name)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    return dict(zip(BASES, ((path,), (adapter,), (config["model_type"], config)), strict=True))


def missed(path: Path, base: tuple[Any, ...], files: dict[str, torch.Tensor], lost: list[str]) -> fmoe.AdapterError:
    save_file({n: t for n, t in files.items() if n not in lost}, path / FILE)
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.lora.load(path, *base)
    return error.value


@HYBRID
@pytest.mark.parametrize("half", "AB")
def test_a_matrix_without_its_other_half_is_refused_by_load_as_by_merge(half, name, tmp_path):
    adapter, files = trained(name, tmp_path)
    for base in bases(name, adapter, tmp_path / "base").values():
        params = fmoe.lora.load(tmp_path, *base).params
        for lost in sorted(n for n in files if f".lora_{half}." in n):
            assert lost in missed(tmp_path, base, files, [lost]).keys, lost
        save_file(files, tmp_path / FILE)
    for lost in (n for n in params if n.endswith((f"lora_{half}.weight", f"_{half}"))):
        with pytest.raises(fmoe.AdapterError, match="stands alone") as error:
            fmoe.lora.merge({}, {n: t for n, t in params.items() if n != lost}, 1.0)
        assert lost in error.value.keys
        with pytest.raises(fmoe.AdapterError, match="stands alone|stands without"):
            fmoe.lora.save({n: t for n, t in params.items() if n != lost}, tmp_path / "again", adapter)


@HYBRID
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3], 2])
def test_peft_wraps_parameters_of_all_layers_and_a_lost_one_is_missed(layers, name, tmp_path):
    """Whatever layers_to_transform says, or exclude_modules: those are of modules."""
    adapter = fmoe.adapter(longer(name).config.model_type, longer(name).config)
    said = dict(target_parameters=parameters(adapter), layers_to_transform=layers, exclude_modules=["experts"])
    adapter, files = trained(name, tmp_path, **said)
    experts = sorted({re.sub(r"\.base_layer$", "", m) for m in modules(files) if ".experts" in m})
    assert len(experts) > 1
    for base in bases(name, adapter, tmp_path / "base").values():
        fmoe.lora.load(tmp_path, *base)
        for module in experts:
            error = missed(tmp_path, base, files, [n for n in files if n.startswith(f"{module}.")])
            assert any(module in key for key in error.keys), module
        save_file(files, tmp_path / FILE)


TOWERS = ["qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "qwen3_omni_moe_thinker", "dots3_note"]


@pytest.mark.parametrize("name", TOWERS)
def test_what_is_lost_of_a_tower_is_missed_in_its_layers_and_beside_them(name, tmp_path):
    """Of each module; of a tower that has no matrices at all nobody knows that it should."""
    model = longer(name)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)  # PEFT adapts these
    found = [n for n, m in model.named_modules() if isinstance(m, kinds) and re.search("vision|visual|audio", n)]
    _, files = trained(name, tmp_path, target_modules=found)
    model.save_pretrained(tmp_path / "base")
    fmoe.lora.load(tmp_path, tmp_path / "base")
    assert len(modules(files)) == len(found) > 3
    for module in modules(files):
        error = missed(tmp_path, (tmp_path / "base",), files, [n for n in files if n.startswith(f"{module}.lora_")])
        assert any(module in key for key in error.keys) or module.partition(".model.")[2] in str(error), module
