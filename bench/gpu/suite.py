"""The tests of the kernels on this device, 14 at a time."""

import subprocess
import sys

from common import DRY, Record

NAMES = ("layer", "twins", "ops", "fp8", "gmm_codes", "transforms", "backend")
FILES = [f"tests/kernels/test_kernels_{name}.py" for name in NAMES]
DRY_TEST = "tests/kernels/test_kernel_reference.py::test_golden_c2"


def main(record: Record) -> None:
    chosen = [DRY_TEST, "-n0"] if DRY else [*FILES, "-n", "14"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout
    last = ""
    for line in run.stdout:  # a failure is known as soon as it happened
        last = line.strip() or last
        if line.startswith(("FAILED", "ERROR")):
            record(kind="tests", reason=line.strip()[:300])
    record(kind="tests", code=run.wait(), said=last[-200:])
