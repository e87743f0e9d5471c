"""Compiles on a CPU what `gpu.sh` will launch on an H200, into a cache that is carried there.

    python bench/gpu/precompile.py        # with the triton of the device, which must be the same to the byte

Files of the cache hold absolute paths, so it is used at one path, FMOE_CACHE (/tmp/fmoe-triton-cache), which both sides
link to build/triton-cache in this project.
"""

import os
import sys
import time
from pathlib import Path

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


def main() -> None:
    link()
    sys.path.insert(0, str(ROOT / "bench"))
    from common import DECODE, SHAPES
    from fake_gpu import fake_gpu

    began, every = time.perf_counter(), set()
    for name, s in (SHAPES | DECODE).items():
        with fake_gpu() as seen:
            layer(*s)
        every |= {(kernel, key) for kernel, key, _ in seen}
        print(f"{name}: {len(seen)} launches, {len(every)} kernels, {time.perf_counter() - began:.0f} s", flush=True)
    size = sum(f.stat().st_size for f in (ROOT / "build" / "triton-cache").rglob("*") if f.is_file())
    print(f"{len(every)} kernels, {size / 2**20:.0f} MiB in build/triton-cache")


if __name__ == "__main__":
    main()
