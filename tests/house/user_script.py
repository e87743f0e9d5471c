"""What a user writes, checked by `mypy --strict` against the editable install (in .ci/run); never run."""

from pathlib import Path
from typing import assert_type

import torch

import fmoe

adapter = fmoe.adapter("qwen3_moe", {"num_experts": 2})
assert_type(adapter, fmoe.Adapter)
native: dict[str, torch.Tensor] = fmoe.load(Path("path"))
y: torch.Tensor = fmoe.moe(native, torch.ones(1, 2), adapter.moe_config)
layer = fmoe.nn.MoE(adapter.moe_config)
lora = fmoe.lora.init(native, r=4)
report = fmoe.convert("a", "b")
names: list[str] = [name for name, _ in adapter.iter_hf(native)]
fmoe.patch(layer)
fmoe.experts(native, y, "not a routing", adapter.moe_config)  # type: ignore[arg-type]  # (that it is seen is checked)
