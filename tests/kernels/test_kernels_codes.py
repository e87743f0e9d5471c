"""Experts in codes by Triton: the bits of its products on what they say; what compilers make of the kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_cases as cases
import pytest
import torch
from fmoe_kernels.host import configs
from fmoe_kernels.programs.codes import tiles_of
from kept import layer, lora, results, tokens

from fmoe.backends.mlp import mlp

BENCH = Path(__file__).parents[2] / "bench"
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
KINDS = ("mxfp4", "nvfp4", "int4", "fp8", "int8", "signed", "points", "late")
CLASSES = ("large", "narrow", "small", "decode")


@pytest.mark.slow  # the cheap row is in test_kernels_fp8.py
@pytest.mark.parametrize(
    "fmt", ["mxfp4 blocks", "nvfp4", "fp8 side one", "int4 pack", "int8 pack zeros", "nvfp4 stack amax"]
)
def test_triton_decodes_what_it_multiplies(fmt: str) -> None:
    codes, decoded, config = layer(fmt)
    codes, decoded = ({n: t.to(cases.DEVICE) for n, t in p.items()} for p in (codes, decoded))
    x, routing = tokens(config)
    x, routing = x.to(cases.DEVICE), routing._replace(**{n: t.to(cases.DEVICE) for n, t in routing._asdict().items()})
    by_products = lambda params, rows, config: mlp(params, rows, config, by="triton")  # as the backend has LoRA
    tuned = {n: t.to(cases.DEVICE) for n, t in lora(config).items()}
    for more in ({}, tuned):
        expected = results(decoded | more, x, routing, config, backend=by_products)
        found = results(codes | more, x, routing, config, backend="triton")
        assert all(torch.equal(found[n], t) for n, t in expected.items()) and found.keys() == expected.keys()
        near = results(decoded | more, x, routing, config, backend="loop")
        assert all((found[n] - t).norm() <= 1e-5 * t.norm() for n, t in near.items())


ROWS = json.loads((BENCH / "results" / "aot_codes.json").read_text())


def test_the_committed_figures_are_of_the_tiles_that_run_and_nothing_spills() -> None:
    """By both versions of triton, which make the same of what counts."""
    table, by = configs.load()["sm_90"]["gmm"], dict[tuple[str, ...], list[dict[str, Any]]]()
    for r in ROWS:
        by.setdefault((r["kind"], str(r["turned"]), r["class"]), []).append(r)
        assert r["tiles"] == str(tiles_of(table[r["class"]])) and r["wgmma"] and r["tma_load"]
        assert r["registers"] <= 255 and r["shared"] <= 232448 and r["spills"] == 0, r
    assert by.keys() == {(k, t, c) for k in KINDS for t in ("False", "True") for c in CLASSES}
    for one, other in by.values():
        assert (one["triton"], other["triton"]) == ("3.6.0", "3.9.0")
        assert all(one[n] == other[n] for n in ("wgmma", "mma", "tma_load", "tma_store", "shared")), (one, other)


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "layer.codes_kernel", *options, "--json", str(folder / "rows.json")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BENCH)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "rows.json").read_text())


def committed(rows: list[dict[str, Any]]) -> None:
    """Held to the figures by this version of triton, whose compilers always make the same of the same."""
    if rows[0]["triton"] not in {r["triton"] for r in ROWS}:
        pytest.skip(f"results/aot_codes.json has no figures of triton {rows[0]['triton']}")
    assert all(r in ROWS for r in rows), rows


def test_the_committed_figures_are_those_of_this_kernel(tmp_path: Path) -> None:
    committed(compiled(tmp_path, "--kind", "mxfp4", "--only", "large"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_format_compiles_ahead_of_time(arch: str, tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--arch", arch)
    for r in rows:
        assert r["mma"] and r["shared"] <= SHARED[arch], r
    if arch == "sm_90":
        committed(rows)
