"""What compilers make of the kernels for GPUs that are not here: `bench/aot.py`, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIELDS = "kernel arch config hot registers spills shared wgmma tma_load tma_store async_wait".split()
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
PRODUCTS = {"up", "gmm", "dact", "dw"}
FP8 = {"sm_90": {"gmm_fp8", "quantize"}, "sm_100": {"gmm_fp8", "quantize"}}  # only these have e4m3 as checkpoints do
OTHERS = {"count", "scan", "place", "tiles", "combine", "bias", "dweight", "forward", "backward"}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Every kernel x shipped tile x architecture: about a minute."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def where(record: dict[str, Any]) -> str:
    return f"{record['kernel']} {record['arch']} {record['config']} {record['variant']}"


def test_hot_tiles_on_hopper(records: list[dict[str, Any]]) -> None:
    found = [r for r in records if r["hot"] and r["arch"] == "sm_90"]
    assert {r["kernel"] for r in found} == PRODUCTS | {"gmm_fp8"}
    for r in found:
        assert r["wgmma"] and r["tma_load"] and r["tma_store"], where(r)
        # a step's product in FP8 is scaled before it is added: it waits for each, and overlaps by its two warpgroups
        assert r["async_wait"] or r["kernel"] == "gmm_fp8", where(r)
        assert r["spills"] == 0 and r["registers"] <= 255 and r["shared"] <= 232448, where(r)


def test_small_batches_use_the_matrix_units_of_hopper(records: list[dict[str, Any]]) -> None:
    found = [r for r in records if r["arch"] == "sm_90" and "swap" in r["config"]]
    assert {r["kernel"] for r in found} == {"up", "gmm", "dact", "gmm_fp8"}
    for r in found:
        assert r["wgmma"] and r["config"].startswith("16x"), where(r)


@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_and_tile_fits(records: list[dict[str, Any]], arch: str) -> None:
    found = [r for r in records if r["arch"] == arch]
    assert {r["kernel"] for r in found} == PRODUCTS | OTHERS | FP8.get(arch, set())
    for r in found:
        assert set(FIELDS) <= set(r)
        assert r["spills"] == 0 and r["shared"] <= SHARED[arch], where(r)
        if r["kernel"] in PRODUCTS | {"gmm_fp8"} and "fp32" not in r["variant"]:
            assert r["mma"], where(r)


def python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return run.stdout.strip()


def test_the_reference_needs_no_triton() -> None:
    assert python("import sys, fmoe_kernels.reference; print('triton' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "call", ["experts(x, i, w, None, torch.ones(1, 4, 8), torch.ones(1, 4, 4))", "activations.swiglu(x)"]
)
def test_on_a_cpu_without_interpreter_it_says_so(call: str) -> None:
    code = f"""
import torch, fmoe_kernels
x, i, w = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
try:
    fmoe_kernels.{call}
except ValueError as error:
    print(error)
"""
    assert python(code).startswith("fmoe_kernels: x is on the CPU, expected a GPU; use fmoe_kernels.reference")
