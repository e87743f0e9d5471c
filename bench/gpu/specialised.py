"""The kernels with warps of two kinds, which no table ships, against their twins with the same tiles: bits, and time.

Late among the steps, and by itself: what has never run may hang.
"""

from typing import Any

import torch
from common import DRY, MAIN, SHAPES, Record, layer, seconds, tried
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.up import up

TILES = {
    "gmm": Config(128, 256, 64, 8, 4, 2, tma=True, specialised=True),
    "up": Config(128, 128, 64, 8, 3, 2, tma=True, specialised=True),
}


def main(record: Record) -> None:
    for name in MAIN:
        x, indices, weights, w_up, w_down = layer(SHAPES[name])
        r, act = make_route(indices, None, len(w_up)), Act("swiglu", 1.0, 0.0)
        p, a = weights.flatten(), torch.randn(indices.numel(), w_down.shape[1], dtype=x.dtype, device=x.device)
        calls = {
            "gmm": lambda c, a=a, w=w_down, r=r: gmm(a, w, None, None, r, Tiling(only=c)),
            "up": lambda c, x=x, w=w_up, p=p, r=r, act=act: up(x, w, None, p, r, act, Tiling(only=c), True)[0],
        }

        def compared(call: Any, c: Config) -> dict[str, Any]:
            twin = c._replace(specialised=False)
            found, expected = call(c), call(twin)
            apart = (found.float() - expected.float()).norm() / expected.float().norm()
            times = dict(ms=1e3 * seconds(lambda: call(c)), twin_ms=1e3 * seconds(lambda: call(twin)))
            return dict(same=torch.equal(found, expected), apart=apart.item(), **times)

        for kernel, call in calls.items():
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
