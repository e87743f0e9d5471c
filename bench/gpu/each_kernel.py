"""Every kernel by itself at the shapes of published models: time, TFLOP/s or bandwidth.

    python bench/gpu/each_kernel.py [--json FILE] [--shape "qwen3-30b 32k"] [--sweep TABLE]

`grouped_mm` is torch's product of the same sizes on rows that are already sorted. --sweep also times the tiles below
for one shape of each class, and writes the table of the fastest: what `fmoe_kernels.tune` does with all its candidates.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fmoe_kernels
import torch
from common import DECODE, DEVICE, DRY, DTYPE, SHAPES, SWEPT, Shape, layer, main, seconds, tried
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs import fp8, sums
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.up import up
from torch.nn import functional as F

SIZES = [(128, 128, 8, 4), (128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 3), (64, 64, 4, 4)]
SIZES += [(128, 256, 8, 4), (128, 256, 8, 3), (256, 128, 8, 3), (64, 256, 4, 4)]
TILES = [Config(*size[:2], 64, *size[2:], parts, 8, 1, tma=True) for size in SIZES for parts in (2, 4)]
TILES += [Config(128, 128, 64, 4, 3, 2, 8, 2, tma=True), Config(64, 128, 64, 4, 3, 4, 8, 2, tma=True)]
TILES += [Config(*size, 64, 4, 4, 1, 8, 2, swap=True, tma=True) for size in ((16, 64), (16, 128), (32, 64))]
TILES += [Config(128, 128, 64, 8, 4, 2, group, 1, tma=True) for group in (4, 16)]
if DRY:
    TILES = [Config(16, 32, 16, 4, 1), Config(16, 32, 16, 4, 1, tma=True)]


def calls(s: Shape) -> dict[str, tuple[Callable[[], object], float, float]]:
    """Name -> (launch, FLOPs, bytes that must move)."""
    x, indices, weights, w_up, w_down = layer(s)
    flat, act, tiling, N = weights.flatten(), Act("swiglu", 1.0, 0.0), Tiling(), s.T * s.K
    r = make_route(indices, None, s.E)
    a, z = up(x, w_up, None, flat, r, act, tiling, True)
    assert z is not None
    rows, dy = gmm(a, w_down, None, None, r, tiling), torch.randn_like(x)
    dz, _, partial = dact(dy, w_down, z, flat, r, act, tiling)
    product, ends = 2.0 * N * s.D * s.I, r.offsets[1:]
    out_up, out_down = torch.empty_like(w_up.mT), torch.empty_like(w_down)
    moved = 2.0 * (N + s.T) * s.D
    q, scale = fp8.quantize_rows(rows)
    w_q, w_scale = w_up.to(fp8.E4M3), w_up.new_ones(s.E, -(-s.D // 128), -(-2 * s.I // 128), dtype=torch.float32)
    return {
        "route": (lambda: make_route(indices, None, s.E), 0, 8.0 * N),
        "up": (lambda: up(x, w_up, None, flat, r, act, tiling, True), 2 * product, 0),
        "down": (lambda: gmm(a, w_down, None, None, r, tiling), product, 0),
        "combine": (lambda: sums.combine(rows, None, r, s.T, x.dtype), 0, moved),
        "dact": (lambda: dact(dy, w_down, z, flat, r, act, tiling), product, 0),
        "dw_down": (lambda: dw(a, dy, r, out_down, tiling), product, 0),
        "dx": (lambda: gmm(dz, w_up.mT, None, None, r, tiling), 2 * product, 0),
        "dw_up": (lambda: dw(dz, x, r, out_up, tiling), 2 * product, 0),
        "dweight": (lambda: sums.dweight(partial, dy, None, r), 0, 4.0 * partial.numel()),
        "bias": (lambda: sums.bias_gradient(dz, None, r, x.dtype), 0, 4.0 * N * s.I),
        "fp8 quantize": (lambda: fp8.quantize_rows(rows), 0, 3.0 * rows.numel()),
        "fp8 up": (lambda: fp8.launch(q, scale, w_q, w_scale, x.dtype, r, tiling), 2 * product, 0),
        "grouped_mm up": (lambda: F.grouped_mm(rows, w_up, offs=ends), 2 * product, 0),
        "grouped_mm down": (lambda: F.grouped_mm(a, w_down, offs=ends), product, 0),
        "copy": (lambda: rows.clone(), 0, 4.0 * N * s.D),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for name, s in (SHAPES | DECODE).items():
        if options.shape not in (None, name):
            continue
        for kernel, (call, flops, moved) in calls(s).items():

            def one(call=call, flops=flops, moved=moved) -> dict[str, Any]:
                t = seconds(call)
                return dict(ms=1e3 * t, tflops=flops / t / 1e12, gbps=moved / t / 1e9)

            records.append(tried(dict(shape=name, kernel=kernel), one))
        if options.sweep and name in SWEPT:
            sizes = dict(n_tokens=s.T, dim=s.D, width=s.I, n_experts=s.E, top_k=s.K)
            timings = fmoe_kernels.tune(options.sweep, **sizes, dtype=DTYPE, device=DEVICE, among=TILES)
            for kernel, found in timings.items():
                records += [dict(shape=name, kernel=kernel, tiles=c, ms=1e3 * t) for c, t in found.items()]
        torch.cuda.empty_cache()
    return records


if __name__ == "__main__":
    main(__doc__, measure, shape={}, sweep=dict(type=Path, metavar="TABLE"))
