"""L2: torchtitan's own checkpointer and adapters beside ours, on a CPU (pip install --no-deps torchtitan)."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2] / "bench" / "peers" / "with_torchtitan.py"


@pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_L2_torchtitans_own_checkpointer_loads_what_fmoe_writes_and_its_adapters_make_the_same() -> None:
    run = subprocess.run([sys.executable, BESIDE], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    told = [line.partition(":")[::2] for line in run.stdout.splitlines() if ": equal, with torchtitan" in line]
    assert [name for name, _ in told] == ["qwen3_moe", "deepseek_v3"]
