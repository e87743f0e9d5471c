"""What another system's directory or an adapter is by address: converted as from a folder, told as there."""

import json

import pytest
from directories import files
from safetensors.torch import save_file
from servers import serving
from systems_zoo import model

import fmoe
import fmoe.docs
from fmoe import AdapterError
from fmoe.systems import SYSTEMS

KIND = "qwen3_moe alike"
FILES = [s.name for s in SYSTEMS.values() if s.container in ("safetensors", "memory") and s.knows("qwen3_moe")]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def hf(tmp_path):
    config, tensors = model(KIND)
    (path := tmp_path / "hf").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    for name in ("generation_config.json", "tokenizer.json"):  # what goes along is fetched too
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("system", FILES)
def test_to_a_system_and_back_by_address_is_as_from_the_folder(hf, tmp_path, system):
    with serving(tmp_path) as server:
        fmoe.convert(f"{server.url}/hf", tmp_path / "there", to=system)
        fmoe.convert(hf, tmp_path / "expected", to=system)
        assert files(tmp_path / "there") == files(tmp_path / "expected")
        away, here = f"{server.url}/there", fmoe.inspect(tmp_path / "there")["format"]
        for call in (fmoe.load, fmoe.adapter, lambda path: fmoe.convert(path, tmp_path / "no", to="hf")):
            with pytest.raises(
                AdapterError,
                match=rf"there is {here}'s, as is told by '.+\. Fix: .*/there HF --to hf --from {here}, then",
            ):
                call(away)
        assert fmoe.inspect(away)["format"] == here
        fmoe.convert(away, tmp_path / "back", to="hf", from_=here)
    fmoe.convert(tmp_path / "there", tmp_path / "again", to="hf")
    assert files(tmp_path / "back") == files(tmp_path / "again") and not (tmp_path / "no").exists()


def test_an_adapter_by_address_is_told_to_be_one(tmp_path):
    base = fmoe.docs.example()
    lora, fix = fmoe.lora.init(fmoe.load(base), r=2), r"Fix: download it, fmoe\.lora\.load\(DIR, BASE\)"
    fmoe.lora.save(lora, tmp_path / "lora", fmoe.adapter(base), lora_alpha=4, base=base)
    with serving(tmp_path) as server:
        for call in (fmoe.load, fmoe.adapter, fmoe.inspect, fmoe.verify):
            with pytest.raises(AdapterError, match=rf"is a LoRA adapter.*{fix}"):
                call(f"{server.url}/lora")
