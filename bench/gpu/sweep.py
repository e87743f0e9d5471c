"""Tiles by time: what `fmoe_kernels.tune` finds for each main shape, into OUT/tiles.json, shape after shape."""

import os
from pathlib import Path
from typing import Any

import fmoe_kernels
from common import DECODE, DEVICE, DRY, DTYPE, MAIN, SHAPES, Record, tried
from fmoe_kernels.host.configs import Config

TINY = [Config(16, 32, 16, 4, 1), Config(16, 32, 16, 4, 1, tma=True)]


def main(record: Record) -> None:
    for name in MAIN if DRY else [*MAIN[:2], list(DECODE)[2], MAIN[2]]:
        tried(record, lambda name=name: tiles(record, name), shape=name)


def tiles(record: Record, name: str) -> dict[str, Any]:
    s, path = (SHAPES | DECODE)[name], Path(os.environ["OUT"]) / "tiles.json"
    sizes = dict(n_tokens=s.T, dim=s.D, width=s.I, n_experts=s.E, top_k=s.K, dtype=DTYPE, device=DEVICE)
    found = fmoe_kernels.tune(path, **sizes, among=TINY if DRY else None, limit=18)  # of the 80 s of four shapes
    for kernel, timings in found.items():
        for config, t in sorted(timings.items(), key=lambda row: row[1]):
            record(shape=name, kernel=kernel, tiles=config, ms=1e3 * t)
    return dict(kernel="all", tiles=f"{sum(map(len, found.values()))} timed")
