"""What one writer tells of what it writes, and of what it takes away, every writer tells."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import files

import fmoe
import fmoe.dcp
from fmoe import Adapter, AdapterError
from fmoe.types import Params

BLOCK = "model.layers.0.mlp.experts"
STACKS = {f"{BLOCK}.gate_and_up_projs": torch.randn(2, 128, 256), f"{BLOCK}.down_projs": torch.randn(2, 128, 128)}
PLAIN = {"layers.0.w": torch.ones(2, 3, 4), "norm": torch.ones(3)}
OWN = fmoe.rule("layers.{l}.w.{e} [i d]", "layers.{l}.w [e d i]") | fmoe.keep("norm")


def of(model_type: str, **more: Any) -> Adapter:
    choices = {n: more.pop(n) for n in ("quantize",) if n in more}
    sizes = dict(num_experts=2, num_local_experts=2, hidden_size=128, intermediate_size=128, moe_intermediate_size=128)
    return fmoe.adapter(model_type, {"model_type": model_type} | sizes | more, **choices)


def converted(params: Params, path: Path, adapter: Adapter, **how: Any) -> tuple[str, ...]:
    """By way of native files, of numbers where codes are yet to be made of them."""
    anew = adapter.from_hf(adapter.to_hf(params)).keys() - params.keys()
    choices = {"quantize": "fp8"} if anew else {} if adapter.config else {"adapter": adapter}
    native = path.parent / "native"
    fmoe.save(params, native, adapter, "native", fsync=False, force=True, quantization=False if anew else None)
    return fmoe.convert(native, path, "hf", fsync=False, **choices, **how).notes


WRITERS: dict[str, Callable[..., tuple[str, ...]]] = {
    "convert": converted,
    "save": lambda params, path, adapter, **how: fmoe.save(params, path, adapter, fsync=False, **how).notes,
    "dcp.save": lambda params, path, adapter, **how: fmoe.dcp.save(params, path, adapter, fsync=False, **how).notes,
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@cache
def cases() -> dict[str, tuple[Params, Adapter, str]]:
    codes = of("qwen3_moe", quantize="fp8")
    changed = codes.from_hf(codes.to_hf(STACKS))
    changed[f"{BLOCK}.down_projs"] = changed[f"{BLOCK}.down_projs"] * 1.5
    return {
        "stacks that a decoder passes by": (STACKS, of("qwen3_vl_moe_text", quantize="fp8"), "takes codes for numbers"),
        "changes that become codes": (changed, codes, "were changed since they were decoded"),
        "numbers wider than the config": (STACKS, of("qwen3_moe", dtype="bfloat16"), "config.json says bfloat16"),
        "a rule of nothing": (PLAIN, OWN | fmoe.keep("nothing.{rest}"), "keep nothing.{rest} matches no name"),
    }


@every_writer
@pytest.mark.parametrize("case", cases())
def test_what_is_written_is_told_alike(write, case, tmp_path):
    params, adapter, text = cases()[case]
    assert sum(text in note for note in write(params, tmp_path / "out", adapter)) == 1


@every_writer
def test_what_is_taken_away_is_named_and_nothing_else_is(write, tmp_path):
    out = tmp_path / "out"
    gone = ["adapter_config.json", "adapter_model.safetensors", "hf_quant_config.json", "old.safetensors"]
    gone += ["pytorch_model.bin"]
    kept = ["config.json", "notes.txt", "tokenizer.json"]
    out.mkdir()
    for name in (*gone, *kept):
        (out / name).write_text("{}")
    before = files(out)
    with pytest.raises(AdapterError, match="is not empty"):
        write(PLAIN, out, OWN)
    assert files(out) == before
    notes = write(PLAIN, out, OWN, force=True)
    lost = sorted(before.keys() - files(out).keys())
    assert f"of the former model, removed: {', '.join(map(repr, lost))}" in notes
    assert lost == (sorted([*gone, "config.json", "tokenizer.json"]) if write is converted else gone)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin"])
def test_a_model_of_other_files_is_not_saved_beside_in_silence(name, tmp_path):
    (tmp_path / name).write_text("{}")
    for write in (fmoe.save, fmoe.dcp.save):
        with pytest.raises(AdapterError, match=f"is not empty, but holds '{name}'"):
            write(PLAIN, tmp_path, OWN)
    assert fmoe.save(PLAIN, tmp_path, OWN, force=True).notes[-1] == f"of the former model, removed: '{name}'"
    assert [*files(tmp_path)] == ["model.safetensors"]
