"""The measurements for a GPU, dry: that the scripts run before the hour in which a GPU is there."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = ("No module named 'scattermoe'", "No module named 'liger_kernel'")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpu_sh_runs_dry(tmp_path: Path) -> None:
    environment = os.environ | {"FMOE_DRY": "1", "TRITON_INTERPRET": "1"}
    run = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for name, fields in {"correct": "ratio repeats", "kernels": "ms", "layers": "forward_ms saved_bytes"}.items():
        records = json.loads((tmp_path / f"{name}.json").read_text())["records"]
        assert records, name
        for record in records:
            missing = any(text in record.get("error", "") for text in MISSING)
            assert missing or all(field in record for field in fields.split()), record
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table["cpu"]["up"]["fp32"]["rows"] == 16
    assert (tmp_path / "layers.png").stat().st_size > 10_000 and "tiny" in (tmp_path / "report.txt").read_text()
