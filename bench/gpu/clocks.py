"""What this GPU gives at its best: clocks, a large product, a copy."""

import shutil
import subprocess

import torch
import triton
from common import DEVICE, DRY, DTYPE, Record, seconds, tried


def main(record: Record) -> None:
    name = "none: a dry run" if DRY else torch.cuda.get_device_name(0)
    count = 0 if DRY else torch.cuda.get_device_properties(0).multi_processor_count
    record(device=name, multiprocessors=count, torch=torch.__version__, triton=triton.__version__)
    n = 64 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))

    def product() -> dict[str, float]:
        t = seconds(lambda: a @ b, budget=2)
        return dict(ms=1e3 * t, tflops=2 * n**3 / t / 1e12)

    def copy() -> dict[str, float]:
        big = torch.empty(n * n * 8, device=DEVICE, dtype=DTYPE)
        t = seconds(lambda: big.clone(), budget=1)
        return dict(ms=1e3 * t, gbps=2 * big.nbytes / t / 1e9)

    tried(record, product, kernel="matmul 8192^3" if not DRY else "matmul")
    tried(record, copy, kernel="copy")
    tried(record, clocks, kernel="clocks under load" if not DRY else "clocks")


def clocks() -> dict[str, str]:
    if not (tool := shutil.which("nvidia-smi")):
        return dict(clocks="no nvidia-smi here")
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    found = subprocess.run([tool, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=5)
    return dict(clocks=found.stdout.strip())
