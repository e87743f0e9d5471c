"""compute-sanitizer's racecheck over small layers: what two threads of a program do to shared memory.

python bench/gpu/races.py        # what the tool watches: two small layers, forward and backward
"""

import shutil
import subprocess
import sys

from common import DRY, Record, Shape, layer, leaves, trained

SMALL = Shape(4, 16, 16, 2, 1) if DRY else Shape(40, 256, 128, 4, 2)


def main(record: Record) -> None:
    tool = shutil.which("compute-sanitizer")
    command = [sys.executable, __file__]
    if tool is None and not DRY:
        return record(kind="racecheck", reason="compute-sanitizer is not installed")
    checked = [*([tool, "--tool", "racecheck", "--error-exitcode", "9"] if tool and not DRY else []), *command]
    found = subprocess.run(checked, capture_output=True, text=True)
    said = (found.stdout + found.stderr).strip().splitlines()[-3:]
    record(kind="racecheck", hazards=found.returncode == 9, code=found.returncode, said=" | ".join(said)[-300:])


def small() -> None:
    import fmoe_kernels
    import torch

    for activation in ("swiglu",) if DRY else ("swiglu", "quick_geglu"):
        x, indices, weights, w_up, w_down = args = leaves(layer(SMALL))
        y = fmoe_kernels.experts(x, indices, weights, None, w_up, w_down, activation=activation)
        torch.autograd.grad(y.sum(), trained(args))
    print("ran")


if __name__ == "__main__":
    small()
