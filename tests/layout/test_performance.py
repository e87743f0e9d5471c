"""What the design promises of speed, in numbers that this machine can hold: seconds of planning, ratios of one run."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hf_synthetic as synthetic

import fmoe
from fmoe import TensorSpec


def best(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_deepseek_v3_is_planned_and_proved_in_half_a_second():
    specs = {n: TensorSpec(*spec) for n, spec in synthetic.deepseek_v3_keys().items()}
    assert len(specs) > 46_000
    adapter = fmoe.adapter("deepseek_v3", synthetic.DEEPSEEK_V3_CONFIG)
    assert best(lambda: adapter.plan(specs), 5) < 0.5
    native = adapter.plan(specs).targets
    assert native["model.layers.60.mlp.experts.gate_and_up_projs"].shape == (256, 7168, 4096)
    assert best(lambda: adapter.inverse.plan(native), 5) < 0.5


def test_stacking_experts_is_as_fast_as_cloning_them(tmp_path):
    bench = Path(__file__).parents[2] / "bench" / "adapters.py"
    found = tmp_path / "rows.json"
    command = [sys.executable, bench, "--experts", "64", "--rounds", "9", "--json", found]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    ratios = {row["what"]: row["times as fast as clone()"] for row in json.loads(found.read_text())[2:]}
    assert len(ratios) == 2 and min(ratios.values()) >= 0.8, ratios
