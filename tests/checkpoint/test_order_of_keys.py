"""A config's keys come out of every writer in their order: of patterns for names the first that fits counts."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fmoe
import fmoe.docs

NESTED = {"z.*": 1, ".*": {"k": [{"y": 1, "b": 2}], "a": 3}, "a": {"c": {}, "b": {"z": 1, "a": 2}}}
MORE = {"zzz": NESTED, "later": [NESTED, {"b": 1, "a": 2}], "aaa": NESTED}


def order(value: Any) -> Any:
    """The keys of objects, at any depth, as they stand."""
    if isinstance(value, dict):
        return [(n, order(v)) for n, v in value.items()]
    return [order(v) for v in value] if isinstance(value, list) else None


def same(said: dict[str, Any], path: Path, skip: str = "") -> None:
    found = json.loads(path.read_text())
    assert order({n: found[n] for n in found if n in said and n != skip}) == order(
        {n: v for n, v in said.items() if n in found and n != skip}
    )
    assert found["zzz"] == NESTED


def model(path: Path) -> dict[str, Any]:
    """A model in a directory whose config lists its fields backwards, with some of no meaning."""
    shutil.copytree(fmoe.docs.example(), path)
    said = dict(reversed(json.loads((path / "config.json").read_text()).items()))
    said = {"zzz": NESTED} | said | MORE
    (path / "config.json").write_text(json.dumps(said))
    assert [*said] != sorted(said)
    return said


def _convert(**how: Any) -> Callable[[Path, Path], Any]:
    return lambda src, dst: fmoe.convert(src, dst, **how)


def _back(src: Path, dst: Path, to: str = "native", **how: Any) -> None:
    fmoe.convert(src, dst.with_name("between"), to=to)
    fmoe.convert(dst.with_name("between"), dst, to="hf", **how)


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "save": lambda src, dst: fmoe.save(fmoe.load(src), dst, fmoe.adapter(src)),
    "save native": lambda src, dst: fmoe.save(fmoe.load(src), dst, fmoe.adapter(src), layout="native"),
    "dcp.save": lambda src, dst: fmoe.dcp.save(fmoe.load(src), dst, fmoe.adapter(src)),
    "dcp.save native": lambda src, dst: fmoe.dcp.save(fmoe.load(src), dst, fmoe.adapter(src), layout="native"),
    "native": _convert(to="native"),
    "fused": _convert(to="hf", layout="fused"),
    "back": _back,
    "in another dtype": _convert(to="hf", dtype="bfloat16", cast="all"),
    "in codes": lambda src, dst: _back(src, dst, quantize="fp8"),
    **{to: _convert(to=to) for to in ("torchtitan", "mlx")},
    "from a system": lambda src, dst: _back(src, dst, to="torchtitan", from_="torchtitan"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_a_models_config_keeps_its_order(writer, tmp_path):
    said = model(tmp_path / "model")
    WRITERS[writer](tmp_path / "model", tmp_path / "there")
    same(said, tmp_path / "there" / "config.json", skip="quantization_config")


def test_an_adapters_config_keeps_its_order(tmp_path):
    """And so says of every matrix what was given: with patterns that all fit, in either order."""
    adapter, lora = fmoe.adapter(fmoe.docs.example()), fmoe.lora.init(fmoe.load(fmoe.docs.example()), r=4)
    plain = fmoe.lora.save(lora, tmp_path / "plain", adapter, lora_alpha=8)
    patterns = {".*down_proj": 16.0, r"model\.layers\.0\..*": 4.0, ".*": 2.0}
    for turned in (dict, lambda items: dict(reversed(items))):
        config = replace(plain, alpha_pattern=turned(patterns.items()), other=MORE)
        config = replace(config, rank_pattern=turned(dict.fromkeys(patterns, 4).items()))
        fmoe.lora.save(lora, tmp_path / "it", adapter, config, force=True)
        again = fmoe.lora.load(tmp_path / "it", adapter)
        same(config.json(), tmp_path / "it" / "adapter_config.json")
        targets = plain.target_parameters
        assert [again.config.scale(t) for t in targets] == [config.scale(t) for t in targets]
        assert order(dict(again.config.json())) == order(config.json())
