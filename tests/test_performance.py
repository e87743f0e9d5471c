"""What the design promises of speed, in numbers that this machine can hold: seconds of planning, ratios of one run."""

import time
from collections.abc import Callable

import hf_synthetic as synthetic
import torch

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


def test_stacking_experts_is_as_fast_as_cloning_them():
    shapes = {"gate": (768, 1024), "up": (768, 1024), "down": (1024, 768)}
    tensors = {
        f"layers.0.mlp.experts.{e}.{p}_proj.weight": torch.randn(shape).bfloat16()
        for e in range(64)
        for p, shape in shapes.items()
    }
    adapter = fmoe.adapter("qwen3_moe")
    ratios = []
    for _ in range(9):  # interleaved, since the machine's speed drifts
        clone = best(lambda: {n: t.clone() for n, t in tensors.items()}, 2)
        ratios.append(clone / best(lambda: adapter.from_hf(tensors), 2))
    assert sorted(ratios)[len(ratios) // 2] >= 0.8, ratios
