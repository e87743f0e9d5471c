"""Every kernel by itself at the shapes of published models: time, TFLOP/s or bandwidth; `dact` first.

`grouped_mm` is torch's product of the same sizes on rows that are already sorted.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import DECODE, DRY, SHAPES, Record, Shape, layer, seconds, tried
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs import sums
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.up import up
from torch.nn import functional as F


def calls(s: Shape) -> dict[str, tuple[Callable[[], object], float, float]]:
    """Name -> (launch, FLOPs, bytes that must move). What one takes is drawn: another that fails takes none along."""
    x, indices, weights, w_up, w_down = layer(s)
    flat, act, tiling, N = weights.flatten(), Act("swiglu", 1.0, 0.0), Tiling(), s.T * s.K
    r, drawn = make_route(indices, None, s.E), lambda *shape: torch.randn(N, *shape, device=x.device, dtype=x.dtype)
    a, z, dz, rows, dy = drawn(s.I), drawn(2 * s.I), drawn(2 * s.I), drawn(s.D), torch.randn_like(x)
    partial = drawn(-(-s.I // 128)).float()
    product, ends = 2.0 * N * s.D * s.I, r.offsets[1:]
    out_up, out_down = torch.empty_like(w_up.mT), torch.empty_like(w_down)
    moved = 2.0 * (N + s.T) * s.D
    return {
        "dact": (lambda: dact(dy, w_down, z, flat, r, act, tiling), product, 0),
        "up": (lambda: up(x, w_up, None, flat, r, act, tiling, True), 2 * product, 0),
        "down": (lambda: gmm(a, w_down, None, None, r, tiling), product, 0),
        "dw up": (lambda: dw(dz, x, r, out_up, tiling), 2 * product, 0),
        "dw down": (lambda: dw(a, dy, r, out_down, tiling), product, 0),
        "dx": (lambda: gmm(dz, w_up.mT, None, None, r, tiling), 2 * product, 0),
        "grouped_mm up": (lambda: F.grouped_mm(rows, w_up, offs=ends), 2 * product, 0),
        "grouped_mm down": (lambda: F.grouped_mm(a, w_down, offs=ends), product, 0),
        "combine": (lambda: sums.combine(rows, None, r, s.T, x.dtype), 0, moved),
        "route": (lambda: make_route(indices, None, s.E), 0, 8.0 * N),
        "dweight": (lambda: sums.dweight(partial, dy, None, r), 0, 4.0 * partial.numel()),
        "bias": (lambda: sums.bias_gradient(dz, None, r, x.dtype), 0, 4.0 * N * s.I),
    }


def main(record: Record) -> None:
    for name, s in (SHAPES if DRY else SHAPES | DECODE).items():
        try:
            each = calls(s)
        except Exception as error:
            record(shape=name, reason=f"{type(error).__name__}: {error}"[:300])
            continue
        for kernel, (call, flops, moved) in each.items():

            def one(call=call, flops=flops, moved=moved) -> dict[str, Any]:
                t = seconds(call, budget=0.2)
                return dict(ms=1e3 * t, tflops=flops / t / 1e12, gbps=moved / t / 1e9)

            tried(record, one, kernel=kernel, shape=name)
        if not DRY:
            torch.cuda.empty_cache()
