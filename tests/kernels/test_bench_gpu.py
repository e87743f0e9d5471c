"""The measurements for a GPU, dry: that the steps run, keep their limits and leave what they had when killed."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = "clocks correct layers waits kernels sweep decode fp8 specialised races tests report".split()
MISSING = ("No module named 'scattermoe'", "No module named 'liger_kernel'")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpu_sh_runs_dry(tmp_path: Path) -> None:
    environment = os.environ | {"FMOE_DRY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(["bash", ROOT / "bench" / "gpu.sh"], env=environment, capture_output=True, text=True)
    assert time.monotonic() - began < 210
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime < 100  # of one core: half of what it may
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    found = records(tmp_path)
    assert found[0]["step"] == "start" and found[0]["wheels"]
    assert {r["step"] for r in found} >= {*STEPS, "layers, swept tiles"}
    for r in found:
        assert any(text in r["reason"] for text in MISSING) if "reason" in r else True, r
    told = (tmp_path / "report.txt").read_text()
    assert "tiny" in told and "predicted by model.py" in told
    assert (tmp_path / "layers.png").stat().st_size > 10_000 and len(list(tmp_path.iterdir())) <= 8


STEP = """
import os, subprocess, time
from common import tried
def one(how):
    if how == "no device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(60)
    if how == "error":
        raise ValueError("wrong")
    return dict(process=os.getpid())
def main(record, what="nothing"):
    if what == "tries":
        for i, how in enumerate(["ok", "no device", "ok", "crash", "hang", "error", "ok"]):
            tried(record, lambda: one(how), i=i, how=how)
        return
    record(kernel="before")
    if what == "hangs":
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)
    if what == "fails":
        raise RuntimeError("no such kernel")
    if what == "dies":
        import os; os.abort()
    record(kernel="after")
"""
DRIVER = """
import run
run.STALLED = 1
run.STEPS = {what: run.Step("planted", limit, (what,)) for what, limit in %s.items()}
run.main()
"""


def drive(tmp_path: Path, steps: dict[str, float]) -> subprocess.Popen[str]:
    (tmp_path / "planted.py").write_text(STEP)
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "bench" / "gpu", ROOT, ROOT / "kernels")))
    environment = os.environ | {"FMOE_DRY": "1", "OUT": str(tmp_path / "out"), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", DRIVER % steps], env=environment, text=True)


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driven")
    assert drive(path, {"hangs": 3, "fails": 20, "dies": 20, "works": 20, "tries": 60}).wait(200) == 0
    return path / "out"


def test_a_step_that_hangs_fails_or_dies_stops_no_other(driven: Path) -> None:
    found = records(driven)
    told = {r["step"]: r["reason"] for r in found if "reason" in r}
    assert told["hangs"] == "stopped at its limit of 3 s" and told["dies"] == "ended with -6"
    reasons = [r["reason"] for r in found if r["step"] == "fails" and "reason" in r]
    assert reasons == ["RuntimeError: no such kernel", "ended with 1"]
    for step in ("hangs", "fails", "dies", "works"):
        kept = [r["kernel"] for r in found if r["step"] == step and "kernel" in r]
        assert kept == (["before", "after"] if step == "works" else ["before"])
    assert next(r for r in found if r["step"] == "hangs" and r.get("end"))["seconds"] < 6
    assert (driven / "report.txt").exists()


def test_a_measurement_that_crashes_hangs_or_loses_the_device_costs_itself_alone(driven: Path) -> None:
    found = [r for r in records(driven) if r["step"] == "tries"]
    told = ["", "RuntimeError: CUDA error: an illegal memory access was encountered", "", "ended with -6"]
    told += ["no end after 1 s", "ValueError: wrong", ""]
    assert [r.get("reason", "") for r in found[:-1]] == told and [r["i"] for r in found[:-1]] == list(range(7))
    assert found[-1]["end"] and "reason" not in found[-1]
    assert len({r["process"] for r in found if "process" in r}) == 3


OURS_FAILS = """
import common, layers, by_kernel, fmoe_kernels
rows = []
def fails(*args, **options):
    raise RuntimeError("no kernel image")
fmoe_kernels.experts = by_kernel.up = fails
layers.LAYERS = {name: layers.LAYERS[name] for name in ("ours", "grouped_mm, fair")}
for step in (layers, by_kernel):
    step.main(lambda **values: rows.append(values))
print({r.get("layer") or r["kernel"] for r in rows if "reason" in r}, len(rows))
"""


def test_where_our_kernels_fail_the_others_are_measured(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT / "bench" / "gpu", ROOT, ROOT / "kernels")))
    environment = os.environ | {"FMOE_DRY": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", OURS_FAILS], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() in ("{'ours', 'up'} 14", "{'up', 'ours'} 14"), run.stdout + run.stderr[-2000:]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])  # 20 s
def test_a_kill_loses_nothing_that_was_measured(how: signal.Signals, tmp_path: Path) -> None:
    run = drive(tmp_path, {"works": 20, "hangs": 60})
    path, until = tmp_path / "out" / "records.jsonl", time.monotonic() + 150
    while not (path.exists() and '"hangs"' in path.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(how)
    run.wait(20)
    kept = [(r["step"], r["kernel"]) for r in records(tmp_path / "out") if "kernel" in r]
    assert kept == [("works", "before"), ("works", "after"), ("hangs", "before")]


def test_the_model_names_a_bottleneck_for_every_kernel_and_ranks_tiles() -> None:
    code = """
import model
from fmoe_kernels.host.configs import Config
s = model.SHAPES["qwen3-30b 32k"]
low, high = (model.layer(s, feed) for feed in model.FEEDS)
assert 400 < low["forward_tflops"] < high["forward_tflops"] < model.roofline(s) < 790
assert all(bound in ("tensor", "L2 feed", "issue", "epilogue", "HBM") for _, _, bound in low["kernels"].values())
small = model.layer(s, model.FEEDS[0], {"gmm": Config(64, 64, 64, 4, 4)})
assert small["kernels"]["dx"][1] < low["kernels"]["dx"][1]
assert "qwen3-30b 32k" in model.text()
assert 564 < model.calibration(model.FEEDS[0]) < 1.02 * 628 < model.calibration(model.FEEDS[1]) < 790
assert round(model.calibration(model.FEEDS[0])) == 635  # as its docstring says
print("fits")
"""
    path = os.pathsep.join(map(str, (ROOT / "bench" / "gpu", ROOT, ROOT / "kernels")))
    environment = {k: v for k, v in os.environ.items() if k != "FMOE_DRY"} | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "fits", run.stderr[-2000:]


CARRIED = """
import precompile, torch
from fmoe_kernels.programs.route import make_route
few = lambda: make_route(torch.zeros(4, 2, dtype=torch.long, device="meta"), None, 8).tiles(16)
every = precompile.calls
precompile.calls = lambda: every() | {"few": lambda: {"few": few}}
precompile.main([%r])
"""


@pytest.mark.parametrize("step", ["few", pytest.param("layers", marks=pytest.mark.slow)])  # 23 kernels: 15 s
def test_a_cache_that_is_carried_serves_a_project_elsewhere(step: str, tmp_path: Path) -> None:
    """At the path that both sides link it to: there nothing is compiled, and no C compiler is needed."""

    def precompiled(project: Path, **environment: str) -> list[int]:
        environment |= {"FMOE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": f"{project}/kernels:{project}/bench/gpu"}
        command = [sys.executable, "-c", CARRIED % step]
        dropped = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "FMOE_DRY")
        environment |= {k: v for k, v in os.environ.items() if k not in (*environment, *dropped)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=project)
        assert run.returncode == 0, run.stderr[-2000:]
        found = re.search(r"(\d+) kernels, (\d+) compiled now; (\d+) modules", run.stdout)
        assert found, run.stdout
        return [int(n) for n in found.groups()]

    here, there = tmp_path / "here", tmp_path / "there"
    for project in (here, there):
        for name in ("kernels", "bench/gpu"):
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "bench" / "fake_gpu.py", project / "bench")
    kernels, compiled, modules = precompiled(here)
    assert compiled == kernels >= 4
    shutil.move(here / "build", there / "build")
    shutil.rmtree(here)
    shutil.rmtree(there / "build" / "libcuda", ignore_errors=True)
    assert precompiled(there, CC="/bin/false") == [kernels, 0, modules]
    files = {path.suffix for path in (there / "build" / "triton-cache").rglob("*") if path.is_file()}
    assert files == {".cubin", ".json", *([".so"] if modules else [])}
