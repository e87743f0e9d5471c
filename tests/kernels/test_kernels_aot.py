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
everything = pytest.mark.thorough  # kernels are compiled, for a minute and a half; CI does


def compiled(*options: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), *options, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Every kernel x shipped tile x architecture: a minute and a half."""
    return compiled("--fits")


@pytest.fixture(scope="module")
def brief() -> list[dict[str, Any]]:
    """On Hopper the tiles of large shapes and those of odd widths, once each: seconds."""
    return compiled("--brief")


def where(record: dict[str, Any]) -> str:
    return f"{record['kernel']} {record['arch']} {record['config']} {record['variant']}"


@everything
def test_hot_tiles_on_hopper(records: list[dict[str, Any]]) -> None:
    found = [r for r in records if r["hot"] and r["arch"] == "sm_90"]
    assert {r["kernel"] for r in found} == PRODUCTS | {"gmm_fp8"}
    for r in found:
        assert r["wgmma"] and r["tma_load"] and r["tma_store"], where(r)
        # a step's product in FP8 is scaled before it is added: it waits for each, and overlaps by its two warpgroups
        assert r["async_wait"] or r["kernel"] == "gmm_fp8", where(r)
        assert r["spills"] == 0 and r["registers"] <= 255 and r["shared"] <= 232448, where(r)


@everything
def test_small_batches_use_the_matrix_units_of_hopper(records: list[dict[str, Any]]) -> None:
    found = [r for r in records if r["arch"] == "sm_90" and "swap" in r["config"]]
    assert {r["kernel"] for r in found} == {"up", "gmm", "dact", "gmm_fp8"}
    for r in found:
        assert r["wgmma"] and r["config"].startswith("16x"), where(r)


@everything
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_and_tile_fits(records: list[dict[str, Any]], arch: str) -> None:
    found = [r for r in records if r["arch"] == arch]
    assert {r["kernel"] for r in found} == PRODUCTS | OTHERS | FP8.get(arch, set())
    for r in found:
        assert set(FIELDS) <= set(r)
        assert r["spills"] <= 64 * ("odd" in r["variant"]) and r["shared"] <= SHARED[arch], where(r)
        if r["kernel"] in PRODUCTS | {"gmm_fp8"} and "fp32" not in r["variant"]:
            assert r["mma"], where(r)


LIMITS = {  # of a thread: instructions of the main loop; after it, and exponentials, for 64 elements; waits for copies
    "up": (140, 1300, 64, 14),
    "gmm": (100, 80, 0, 4),
    "dact": (115, 2100, 64, 19),
    "dw": (300, 80, 0, 10),
    "gmm_fp8": (180, 160, 0, 4),
}


def elements(config: str) -> int:
    """Of a tile's result, for each thread."""
    rows, columns, _ = map(int, config.split()[0].split("x"))
    return rows * columns // (32 * int(config.split()[1][1:]))


def spent(r: dict[str, Any]) -> tuple[float, ...]:
    of_64 = 64 / elements(r["config"])
    return r["loop"], r["epilogue"] * of_64, r["exponentials"] * of_64, r["waits_copy"]


def shipped(rows: list[dict[str, Any]], kernel: str) -> dict[str, Any]:
    (found,) = (r for r in rows if r["kernel"] == kernel and r["hot"])
    return found


@everything
@pytest.mark.parametrize("kernel", LIMITS)
def test_what_large_tiles_spend_on_hopper(brief: list[dict[str, Any]], kernel: str) -> None:
    r = shipped(brief, kernel)
    assert r["spills"] == 0 and r["shared"] <= 232448 and r["wgmma"] and r["tma_load"] and r["tma_store"], where(r)
    assert all(found <= most for found, most in zip(spent(r), LIMITS[kernel], strict=True)), spent(r)
    # products are in flight while others are fed, but where a step is scaled before it is added
    assert bool(r["waits_wgmma_in_flight"]) == (kernel != "gmm_fp8"), where(r)


@everything
def test_dact_loads_z_four_times_from_where_it_was_fetched_to_and_two_programs_share_a_multiprocessor(
    brief: list[dict[str, Any]],
) -> None:
    r = shipped(brief, "dact")
    # a load for each part, of both halves; 512 lines of 128 bytes by 128 threads; the step's own barrier is the fifth
    assert r["tma_load"] == 3 + 4 and r["prefetches"] == 4 and r["waits_barrier"] == 5
    assert r["config"].startswith("128x128x64 w4 s3") and r["ctas"] == 2


@everything
def test_tiles_that_are_swept_fit_and_keep_products_in_flight(brief: list[dict[str, Any]]) -> None:
    found = {(r["kernel"], r["config"]): r for r in brief if not r["hot"] and "odd" not in r["variant"]}
    assert {("up", "128x64x64 w4 s3 p2 tma"), ("gmm", "128x128x64 w4 s3 p2 tma flatten")} < set(found)
    for (_, config), r in found.items():
        assert r["spills"] == 0 and r["waits_wgmma_in_flight"] and r["ctas"] == 1 + (" w4 " in config), where(r)
    # tiles and steps are one loop: what a step executes grows a little, and the next tile's loads are not waited for
    assert found["gmm", "128x128x64 w4 s3 p2 tma flatten"]["loop"] <= 115
    # those that multiply do nothing else: 56 and 71 instructions a step where the twins take 91 and 125
    assert found["gmm", "128x256x64 w8 s4 p2 tma specialised"]["loop"] <= 60
    assert found["up", "128x128x64 w8 s3 p2 tma specialised"]["loop"] <= 80


@everything
@pytest.mark.parametrize("kernel", ["up", "gmm", "dact", "dw"])
def test_odd_widths_spill_next_to_nothing(brief: list[dict[str, Any]], kernel: str) -> None:
    (r,) = (r for r in brief if r["kernel"] == kernel and "odd" in r["variant"])
    assert r["spills"] <= 64 and r["mma"], where(r)


def test_the_committed_figures_are_of_the_shipped_tiles() -> None:
    """results/aot.json: before (`was`) and after, by both versions of triton; no tile that ships spills with either."""
    rows = json.loads((ROOT / "bench" / "results" / "aot.json").read_text())
    table = json.loads((ROOT / "kernels" / "fmoe_kernels" / "host" / "configs.json").read_text())["sm_90"]
    versions = {r["triton"] for r in rows if "was" not in r}
    assert {v.rpartition(".")[0] for v in versions} == {"3.6", "3.9"}
    for version in versions:
        now = {(r["kernel"], r["config"]): r for r in rows if r["triton"] == version and "was" not in r}
        now = {name: r for name, r in now.items() if r["hot"] or "odd" in r["variant"]}
        assert {kernel for kernel, _ in now} == PRODUCTS | {"gmm_fp8"}
        for (kernel, tiles), r in now.items():
            large, odd = table[kernel]["large"], table[kernel].get("odd", {})
            sizes = [f"{c['rows']}x{c['columns']}x{c['depth']} w{c['warps']} s{c['stages']}" for c in (large, odd) if c]
            assert tiles.startswith(tuple(sizes)) and r["spills"] <= 64 * ("odd" in r["variant"]), where(r)
            if "odd" not in r["variant"]:
                assert all(found <= most for found, most in zip(spent(r), LIMITS[kernel], strict=True)), where(r)
                assert r["ctas"] >= large.get("ctas", 1), where(r)


@everything
def test_the_committed_figures_are_those_of_these_kernels(brief: list[dict[str, Any]]) -> None:
    """By this version of triton, whose compilers always make the same of the same; `aot.py --brief` writes them."""
    rows = [r for r in json.loads((ROOT / "bench" / "results" / "aot.json").read_text()) if "was" not in r]
    if (version := brief[0]["triton"]) not in {r["triton"] for r in rows}:
        pytest.skip(f"results/aot.json has no figures of triton {version}")
    assert [r for r in rows if r["triton"] == version] == brief


def test_what_changed_is_less_than_it_was() -> None:
    """By each version of triton, the tiles that ship beside those before: dact's has twice the elements a thread."""
    rows = json.loads((ROOT / "bench" / "results" / "aot.json").read_text())
    for version in {r["triton"] for r in rows}:
        here = [r for r in rows if r["triton"] == version]
        now = {k: shipped([r for r in here if "was" not in r], k) for k in PRODUCTS}
        was = {k: [r for r in here if r["kernel"] == k and "was" in r] for k in PRODUCTS}
        assert all(was.values())
        for r in was["dact"]:
            assert spent(now["dact"])[1] < 0.9 * spent(r)[1] and now["dact"]["tma_load"] < r["tma_load"]
        for r in was["up"] + was["gmm"]:
            assert now[r["kernel"]]["registers"] < r["registers"] and now[r["kernel"]]["prologue"] < r["prologue"]
        assert now["dw"]["loop"] <= 0.7 * max(r["loop"] for r in was["dw"])


def test_both_versions_of_triton_make_the_same_of_what_counts() -> None:
    """Matrix instructions, bulk copies, shared memory and exponentials of 3.6 and 3.9, tile by tile."""
    rows = [r for r in json.loads((ROOT / "bench" / "results" / "aot.json").read_text()) if "was" not in r]
    by: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        by.setdefault(where(r), []).append(r)
    for tile, found in by.items():
        assert len(found) == 2, tile
        for name in ("wgmma", "mma", "tma_load", "tma_store", "exponentials"):
            assert found[0][name] == found[1][name], (tile, name)
        assert abs(found[0]["shared"] - found[1]["shared"]) <= 1024, tile


def python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, cwd=ROOT
    )
    return run.stdout.strip()


def test_the_reference_needs_no_triton() -> None:
    assert python("import sys, fmoe_kernels.reference; print('triton' in sys.modules)") == "False"


def test_on_a_cpu_without_interpreter_it_says_so() -> None:
    code = """
import torch, fmoe_kernels
x, i, w = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
experts = lambda: fmoe_kernels.experts(x, i, w, None, torch.ones(1, 4, 8), torch.ones(1, 4, 4))
for call in (experts, lambda: fmoe_kernels.activations.swiglu(x)):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    said = python(code).splitlines()
    assert len(said) == 2
    for text, name in zip(said, "xu", strict=True):
        assert text.startswith(f"fmoe_kernels: {name} is on the CPU, expected a GPU; use fmoe_kernels.reference")
