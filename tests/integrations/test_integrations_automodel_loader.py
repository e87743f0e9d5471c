"""L2: Automodel's published loader, on a CPU, fills models and saves them (pip install --no-deps nemo-automodel)."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from loader_cases import saved

FAMILIES = ["qwen3_moe", "qwen3_5_moe", "deepseek_v3", "gpt_oss", "mixtral", "glm4_moe"]
SCALES = ("weight_scale_inv", "projs_scale_inv", "weight_scale_mxfp8")
"""Beside what it was decoded from, which alone goes back; the reference drops it."""
LOADER = Path(__file__).parents[1] / "helpers" / "vendors" / "automodel_loader.py"


@pytest.mark.skipif(find_spec("nemo_automodel") is None, reason="nemo-automodel is not installed")
def test_L2_automodels_own_loader_fills_and_saves_every_family_through_views_of_the_model(tmp_path: Path) -> None:
    hf = {}
    for name in FAMILIES:
        (tmp_path / name).mkdir()
        hf[name] = saved(name, tmp_path / name)[1]
    call = [sys.executable, LOADER, tmp_path / "out", *(tmp_path / name for name in FAMILIES)]
    run = subprocess.run(call, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    adapters = told.pop("adapters")  # of the reference, beside ours: the same names and numbers
    assert adapters.keys() >= {"deepseek_v4", "deepseek_v41 in codes", "deepseek_v41's draft in codes"}
    for case, found in adapters.items():
        beside = [n for n in found["not"] if not (case.endswith("in codes") and n.endswith(SCALES))]
        assert found["same"] > 10 and not beside, case
    for name, found in told.items():
        load, save = found["asked"]
        assert found["known"] and load["load"] is True and save["load"] is None
        assert load["names"] == len(hf[name]) == save["names"] == load["views"], name  # no second copy of the model
        assert found["same"] and found["back"] and not found["moved"]
        assert {n.rpartition(".")[2] for n in found["in place"]} >= {"gate_and_up_projs", "down_projs"}
    assert told.keys() == {*FAMILIES}
