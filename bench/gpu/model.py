"""What an H200 should do, from counts of instructions: the time of each kernel, and what bounds it.

    python bench/gpu/model.py

A tile's step takes the longest of its matrix product, the feed of its operands from L2, and the issue of its
instructions; before and after the steps come latency, the prologue and the epilogue, which a second program on the
multiprocessor hides. Programs run in waves, of which the last is half empty; no kernel is faster than its bytes in HBM.
Counts of instructions are those of results/aot.json where it has the kernel and tile, else those of COUNTS.

Calibrated, not measured here: ceilings of 790 TFLOP/s and 4.3 TB/s as seen on such a machine; the feed from L2 between
what the best product without multicast sustains, 7.7 TB/s, and 11. The low end gives 635 TFLOP/s for a Triton product
whose published figures on an H200 are 564 to 628 (65536 x 6144 x 6144): so trust the low end.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from common import SHAPES, Shape
from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config

CLOCK, SM, TENSOR, HBM = 1.5e9, 132, 790e12, 4.3e12
FEEDS = (7.7e12, 11e12)
START, LOAD, STORE = 1.5e-6, 0.6e-6, 0.2e-6  # the first tiles of a program; a load or store in an epilogue, waited for
COUNTS = {"up": (127, 562, 1289), "gmm": (91, 364, 143), "dact": (84, 434, 3675), "dw": (253, 819, 148)}
TABLE = Path(__file__).parents[1] / "results" / "aot.json"


class Kernel(NamedTuple):
    """rows x columns x depth of a grouped product by tiles c. halves: tiles of weights for each column block."""

    name: str
    rows: int
    columns: int
    depth: int
    bytes: float
    halves: int = 1
    moved: int = 0  # epilogue loads and stores, each waited for


def counts(kernel: str, c: Config) -> tuple[int, int, int]:
    """(instructions of a thread in a step, before the steps, after them)."""
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else []
    for r in (r for r in rows if "was" not in r):
        if (r["kernel"], r["arch"], r["config"], r["variant"]) == (kernel, "sm_90", str(c), "swiglu") and r.get("loop"):
            return r["loop"], r["prologue"], r["epilogue"]
    return COUNTS[kernel]


def seconds(k: Kernel, kind: str, E: int, feed: float, c: Config) -> tuple[float, str]:
    """(the time of a kernel, what bounds it)."""
    loop, before, after = counts(kind, c)
    issue = lambda n: n * c.warps / 4 / CLOCK
    width = c.columns * k.halves
    steps = {
        "tensor": 2 * c.rows * width * c.depth / (TENSOR / SM),
        "L2 feed": 2 * (c.rows + width) * c.depth / (feed / SM),
        "issue": issue(loop),
    }
    bound = max(steps, key=lambda name: steps[name])
    blocks = math.ceil(k.columns / c.columns)
    if kind == "dw":  # its depth is the rows of an expert
        tiles, n = E * math.ceil(k.depth / c.rows) * blocks, k.rows / E / c.depth + 0.5
    else:
        tiles, n = (k.rows / c.rows + E / 2) * blocks, math.ceil(k.depth / c.depth)
    main = n * steps[bound]
    rest = START + issue(before) + 1.5 * issue(after) + k.moved * LOAD
    one = main + rest if c.ctas == 1 else max(main, (main + rest) / 2 + 0.1 * rest)
    waves = tiles / SM
    time = waves * one * (1 + 0.5 / max(waves, 1))
    if rest > 0.25 * main and c.ctas == 1:
        bound = "epilogue"
    return max(time, k.bytes / HBM), bound if time > k.bytes / HBM else "HBM"


def calibration(feed: float) -> float:
    """TFLOP/s of a product whose published figures on an H200, with Triton and bulk copies, are 564 to 628."""
    n, depth = 65536, 6144
    k = Kernel("gmm", n, depth, depth, 2.0 * (2 * n * depth + depth * depth))
    return 2 * n * depth * depth / seconds(k, "gmm", 1, feed, configs.load()["sm_90"]["gmm"]["large"])[0] / 1e12


def kernels(s: Shape) -> dict[str, tuple[str, Kernel]]:
    """name -> (its kind in the table of tiles, its sizes), of a layer forward and backward."""
    R, D, I, w = s.T * s.K, s.D, s.I, 2 * s.E * s.D * s.I
    return {
        "up": ("up", Kernel("up", R, I, D, 6 * R * I + 2 * s.T * D + 2 * w, 2, 2)),
        "down": ("gmm", Kernel("down", R, D, I, 2 * R * (I + D) + w, 1, 1)),
        "dact": ("dact", Kernel("dact", R, I, D, 10 * R * I + 2 * s.T * D + w, 1, 4)),
        "dw down": ("dw", Kernel("dw down", R, D, I, w + 2 * R * I + 2 * s.T * D, 1, 1)),
        "dx": ("gmm", Kernel("dx", R, D, 2 * I, 2 * R * (2 * I + D) + 2 * w, 1, 1)),
        "dw up": ("dw", Kernel("dw up", R, D, 2 * I, 2 * w + 4 * R * I + 2 * s.T * D, 1, 1)),
    }


def tiles(kind: str, s: Shape, k: Kernel) -> Config:
    """The shipped tiles for this shape on an H200."""
    import torch

    depth = k.rows // s.E if kind == "dw" else k.depth
    bucket = configs.bucket(torch.bfloat16, s.T * s.K, s.E, depth, False)
    found = configs.load()["sm_90"][kind]
    return found.get(bucket) or found["large"]


def layer(s: Shape, feed: float, replaced: dict[str, Config] | None = None) -> dict[str, Any]:
    """TFLOP/s forward and backward, and (ms, TFLOP/s, bound) of each kernel. replaced: other tiles, by kind."""
    each = {}
    for name, (kind, k) in kernels(s).items():
        t, bound = seconds(k, kind, s.E, feed, (replaced or {}).get(kind) or tiles(kind, s, k))
        each[name] = (1e3 * t, 2 * k.rows * k.columns * k.depth * k.halves / t / 1e12, bound)
    sums = 2 * (s.T * s.K + s.T) * s.D / (0.8 * HBM)
    forward = (each["up"][0] + each["down"][0]) / 1e3 + sums + 60e-6
    backward = sum(t for name, (t, _, _) in each.items() if name not in ("up", "down")) / 1e3 + sums + 40e-6
    flops = s.forward_flops
    return dict(kernels=each, forward_tflops=flops / forward / 1e12, backward_tflops=2 * flops / backward / 1e12)


def roofline(s: Shape) -> float:
    """TFLOP/s forward if every kernel ran at the peak of what limits it."""
    combine = 2.0 * (s.T * s.K + s.T) * s.D / HBM
    weights = 6.0 * min(s.E, s.T * s.K) * s.D * s.I / HBM
    return s.forward_flops / (max(s.forward_flops / TENSOR, weights) + combine) / 1e12


def text() -> str:
    """A line for each shape and kernel."""
    lines = []
    for name, s in SHAPES.items():
        low, high = (layer(s, feed) for feed in FEEDS)
        told = ", ".join(
            f"{k.split('_')[0]} {low[k]:.0f} to {high[k]:.0f}" for k in ("forward_tflops", "backward_tflops")
        )
        lines.append(f"{name}: {told}; roof {roofline(s):.0f}")
        for kernel, (ms, tflops, bound) in low["kernels"].items():
            lines.append(f"    {kernel:8} {ms:8.3f} ms {tflops:4.0f} to {high['kernels'][kernel][1]:4.0f}  {bound}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(text())
