"""Tiles by time: what `fmoe_kernels.tune` finds for each main shape, into OUT/tiles.json, shape after shape."""

import os
from pathlib import Path

import fmoe_kernels
from common import DECODE, DEVICE, DRY, DTYPE, MAIN, SHAPES, Record
from fmoe_kernels.host.configs import Config

TINY = [Config(16, 32, 16, 4, 1), Config(16, 32, 16, 4, 1, tma=True)]


def main(record: Record) -> None:
    for name in MAIN if DRY else [*MAIN[:2], list(DECODE)[2], MAIN[2]]:
        s = (SHAPES | DECODE)[name]
        sizes = dict(n_tokens=s.T, dim=s.D, width=s.I, n_experts=s.E, top_k=s.K, dtype=DTYPE, device=DEVICE)
        path = Path(os.environ["OUT"]) / "tiles.json"
        try:
            found = fmoe_kernels.tune(path, **sizes, among=TINY if DRY else None, limit=18)  # of 80 for four
        except Exception as error:
            record(shape=name, reason=f"{type(error).__name__}: {error}"[:300])
            continue
        for kernel, timings in found.items():
            for tiles, t in sorted(timings.items(), key=lambda row: row[1]):
                record(shape=name, kernel=kernel, tiles=tiles, ms=1e3 * t)
