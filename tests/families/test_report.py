"""The look-out says what installed libraries have that fmoe lacks."""

from types import ModuleType, SimpleNamespace

import pytest

from fmoe.families import FAMILIES
from fmoe.families import report as lookout


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A library whose folder is a temporary one."""
    monkeypatch.setattr(lookout, "_folder", lambda package, inside: tmp_path)
    return tmp_path


def test_nothing_of_the_installed_libraries_is_missing():
    found = lookout.report()
    assert [name.split()[0] for name in found] == [*lookout.LOOKS]
    unread = [f"format {name}: not decoded, refused by its name" for name in lookout.UNREAD]
    here = {n: [line for line in lines if line not in unread] for n, lines in found.items()}
    assert all(lines in ([], ["not installed: not looked at"]) for lines in here.values()), found


def test_a_new_model_with_experts_and_one_that_is_gone_are_told(other, monkeypatch):
    monkeypatch.setattr(lookout, "known", lambda: {"mixtral": {}, "gone": {}})
    for name, body in {"new_moe": "class NewMoeExperts(Module):", "mixtral": "class MixtralExperts(Module):"}.items():
        (other / name).mkdir()
        (other / name / f"configuration_{name}.py").write_text(f'class C:\n    model_type = "{name}"\n')
        (other / name / f"modeling_{name}.py").write_text(body + "\n")
    assert [*lookout.transformers_models()] == [
        "model types new_moe have experts and no family",
        "gone: known to fmoe, and gone from Transformers",
    ]


def test_an_adapter_of_automodel_without_a_family_is_told(other):
    assert {*lookout.FOLDERS.values()} <= FAMILIES.keys() and not {*lookout.DENSE} & FAMILIES.keys()
    for name in ("mixtral", "brand_new", "ling_v2", "bagel"):
        (other / name).mkdir()
        (other / name / "state_dict_adapter.py").touch()
    assert "mixtral" in FAMILIES
    assert [*lookout.automodel_models()] == ["brand_new has a state dict adapter and no family of that name"]


def test_formats_and_versions_that_are_not_known_are_told(monkeypatch):
    module = ModuleType("compressed_tensors")
    module.CompressionFormat = [SimpleNamespace(value=n) for n in ("dense", "int3-swirled")]
    monkeypatch.setattr(lookout, "import_module", lambda name: module)
    assert [*lookout.compressed_formats()] == ["format int3-swirled: unknown"]
    module.CompressionFormat = [SimpleNamespace(value=n) for n in lookout.ROWS]
    monkeypatch.setattr(lookout, "FORMATS", {"mxfp4 packed": None})
    told = [*lookout.compressed_formats()]
    assert "format nvfp4-pack-quantized: no row nvfp4 packed" in told and not any("mxfp4" in line for line in told)
    monkeypatch.setattr(lookout.metadata, "version", lambda name: "0.31.0")
    assert [*lookout.peft_forms()] == ["0.31: adapters are compared with 0.18 to 0.21"]
