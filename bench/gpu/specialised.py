"""The kernels with warps of two kinds, which no table ships, against their twins with the same tiles: bits, and time.

Late among the steps, and by itself: what has never run may hang.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import DRY, MAIN, SHAPES, Record, Shape, layer, seconds, tried
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.up import up
from torch import Tensor

TILES = {
    "gmm": Config(128, 256, 64, 8, 4, 2, tma=True, specialised=True),
    "up": Config(128, 128, 64, 8, 3, 2, tma=True, specialised=True),
}


def calls(s: Shape) -> dict[str, Callable[[Config], Tensor]]:
    x, indices, weights, w_up, w_down = layer(s)
    r, act = make_route(indices, None, len(w_up)), Act("swiglu", 1.0, 0.0)
    p, a = weights.flatten(), torch.randn(indices.numel(), w_down.shape[1], dtype=x.dtype, device=x.device)
    return {
        "gmm": lambda c: gmm(a, w_down, None, None, r, Tiling(only=c)),
        "up": lambda c: up(x, w_up, None, p, r, act, Tiling(only=c), True)[0],
    }


def main(record: Record) -> None:
    for name in MAIN:

        def compared(call: Any, c: Config) -> dict[str, Any]:
            twin = c._replace(specialised=False)
            found, expected = call(c), call(twin)
            apart = (found.float() - expected.float()).norm() / expected.float().norm()
            times = dict(ms=1e3 * seconds(lambda: call(c)), twin_ms=1e3 * seconds(lambda: call(twin)))
            return dict(same=torch.equal(found, expected), apart=apart.item(), **times)

        for kernel, call in calls(SHAPES[name]).items():
            if DRY:
                record(shape=name, kernel=kernel, refused=refused(call, TILES[kernel]))
            else:
                tried(record, lambda k=kernel, f=call: compared(f, TILES[k]), shape=name, kernel=kernel)


def refused(call: Any, c: Config) -> str:
    try:
        call(c)
    except ValueError as error:
        return str(error)
    raise AssertionError("a CPU took what only sm_90 runs")
