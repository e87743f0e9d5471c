"""Compiles on a CPU what `gpu.sh` will launch on an H200, into a cache that is carried there.

    python bench/gpu/precompile.py        # with the Python and the triton of the device, the same to the byte

Files of the cache hold absolute paths, so it is used at one path, FMOE_CACHE (/tmp/fmoe-triton-cache), which both sides
link to build/triton-cache in this project.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("FMOE_CACHE", "/tmp/fmoe-triton-cache"))


def link() -> None:
    """Makes build/triton-cache, and CACHE a link to it."""
    (ROOT / "build" / "triton-cache").mkdir(parents=True, exist_ok=True)
    CACHE.unlink(missing_ok=True)
    CACHE.symlink_to(ROOT / "build" / "triton-cache")
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)


def layer(T: int, D: int, I: int, E: int, K: int) -> None:
    """Every launch of a layer's forward, with z and without, and backward."""
    import torch
    from fmoe_kernels.ops.custom import experts_backward, experts_forward

    new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    x, w_up, w_down = new(T, D), new(E, 2 * I, D).mT, new(E, D, I).mT
    indices, weights = new(T, K, dtype=torch.int64), new(T, K, dtype=torch.float32)
    options = ("swiglu", 1.702, 7.0)
    launch = experts_forward._init_fn
    for save in (False, True):
        _, z, *route = launch(
            x, indices, weights, None, w_up, w_down, None, None, *options, False, 0, save, False, False, ""
        )
    needs = [True] * 4 + [False] * 2
    experts_backward._init_fn(new(T, D), x, z, *route, weights, w_up, w_down, None, None, *options, False, "", needs)


class Built(Exception):
    """A module is in the cache; it is not loaded, since it needs a driver."""


def starters(kernels: Iterable[Any]) -> int:
    """Builds what starts these kernels, a C module for each signature, into the cache: the device needs no compiler.

    They are linked to a libcuda with nothing in it. Only the Python that builds them can load them.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    stub = ROOT / "build" / "libcuda"
    stub.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cc", "-shared", "-o", stub / "libcuda.so.1", "-x", "c", "/dev/null"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub)
    paths = set()

    def load(name: str, path: str) -> None:
        paths.add(path)
        raise Built

    build._load_module_from_path = load
    for make in (driver.CudaUtils, *(lambda k=k: driver.CudaLauncher(k.src, k.metadata) for k in kernels)):
        with suppress(Built):
            make()
    return len(paths)


def main() -> None:
    link()
    sys.path.insert(0, str(ROOT / "bench"))
    from common import DECODE, SHAPES
    from fake_gpu import fake_gpu

    began, every = time.perf_counter(), {}
    for shape, s in (SHAPES | DECODE).items():
        with fake_gpu() as seen:
            layer(*s)
        every |= {(name, key): kernel for name, key, kernel in seen}
        print(f"{shape}: {len(seen)} launches, {len(every)} kernels, {time.perf_counter() - began:.0f} s", flush=True)
    started = starters(every.values())
    size = sum(f.stat().st_size for f in (ROOT / "build" / "triton-cache").rglob("*") if f.is_file())
    print(f"{len(every)} kernels, {started} modules that start them, {size / 2**20:.0f} MiB in build/triton-cache")


if __name__ == "__main__":
    main()
