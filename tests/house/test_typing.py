"""A user's script is checked against fmoe as the README's command installs it: editable, and with mypy --strict."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
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
fmoe.experts(native, y, "not a routing", adapter.moe_config)  # the one error
"""


def test_mypy_strict_sees_the_names_and_finds_the_one_error(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and 'expected "tuple[' in errors[0] and "script.py:18" in errors[0], done.stdout
