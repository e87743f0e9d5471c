"""Few tokens: an inference forward replayed from a CUDA graph, ours against grouped_mm."""

from typing import Any

import torch
from common import DECODE, DRY, Record, Shape, layer, seconds, tried
from layers import fair, ours
from torch import Tensor


def replayed(f: Any, s: Shape, args: tuple[Tensor, ...]) -> dict[str, Any]:
    with torch.no_grad():
        f(*args)
        if DRY:
            return dict(us=1e6 * seconds(lambda: f(*args)))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f(*args)
    t = seconds(graph.replay)
    touched = min(s.E, s.T * s.K) * 6 * s.D * s.I
    return dict(us=1e6 * t, weights_gbps=touched / t / 1e9)


def main(record: Record) -> None:
    for name, s in DECODE.items():
        args = layer(s)
        for who, f in {"ours": ours, "grouped_mm, fair": fair}.items():
            tried(record, lambda f=f, s=s, args=args: replayed(f, s, args), layer=who, shape=name)
