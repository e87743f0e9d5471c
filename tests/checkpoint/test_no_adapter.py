"""What is no adapter is refused by the name of the argument, in every public call that takes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fmoe
import fmoe.docs
from fmoe import AdapterError

FOREIGN: list[Any] = [
    {},
    {"model_type": "qwen3_moe"},
    "qwen3_moe",
    3,
    [],
    fmoe.adapter,
    (len, len),
    torch.nn.Linear(1, 1),
]
CALLS: dict[str, Callable[[Any, Path], object]] = {
    "save": lambda own, out: fmoe.save(native(), out, own),
    "load": lambda own, _: fmoe.load(source(), adapter=own),
    "convert": lambda own, out: fmoe.convert(source(), out, adapter=own),
    "verify": lambda own, _: fmoe.verify(source(), adapter=own),
    "inspect": lambda own, _: fmoe.inspect(source(), adapter=own),
    "dcp.save": lambda own, out: fmoe.dcp.save(native(), out, own),
    "dcp.load": lambda own, _: fmoe.dcp.load(native(), source(), own),
    "lora.save": lambda own, out: fmoe.lora.save(fmoe.lora.init(native(), r=2), out, own),
    "sync trainer": lambda own, _: fmoe.sync.stream(own, fmoe.adapter(source()), native()),
    "sync engine": lambda own, _: fmoe.sync.stream(fmoe.adapter(source()), own, native()),
    "draw": lambda own, _: fmoe.draw.layout(own),
}


def source() -> Path:
    return fmoe.docs.example()


def native() -> dict[str, torch.Tensor]:
    return fmoe.load(source())


@pytest.mark.parametrize("own", FOREIGN, ids=lambda own: type(own).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_adapter_is_refused_by_name(call: str, own: Any, tmp_path: Path) -> None:
    argument = call.partition(" ")[2] or "adapter"
    with pytest.raises(AdapterError, match=rf"{argument}= is an? {type(own).__name__}, expected an fmoe.Adapter"):
        CALLS[call](own, tmp_path / "out")
    assert not (tmp_path / "out").exists()
