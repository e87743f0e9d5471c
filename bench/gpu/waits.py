"""No host wait, capture and replay, and what forward keeps for backward, of whole layers."""

from typing import Any

import fmoe_kernels
import torch
from common import DRY, MAIN, SHAPES, Record, Shape, layer, leaves, seconds, trained, tried


def step_of(s: Shape) -> Any:
    args = leaves(layer(s))
    dy = torch.randn_like(args[0])
    x, indices, weights, w_up, w_down = args
    forward = lambda: fmoe_kernels.experts(x, indices, weights, None, w_up, w_down)
    return forward, lambda: torch.autograd.grad(forward(), trained(args), dy)


def kept(s: Shape) -> dict[str, Any]:
    """Bytes that forward leaves for backward, and at the peak of both, above what was there."""
    forward, step = step_of(s)
    if DRY:
        forward()
        return dict(saved_bytes_formula=s.saved_bytes)
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    saved = torch.cuda.memory_allocated() - before - y.nbytes
    del y
    step()
    peak = torch.cuda.max_memory_allocated() - before
    return dict(saved_bytes=saved, saved_bytes_formula=s.saved_bytes, peak_bytes=peak)


def waited(s: Shape) -> dict[str, Any]:
    """A step with host waits forbidden; without a GPU it only runs."""
    _, step = step_of(s)
    step()
    if not DRY:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")
    return dict(waits=False)


def replayed(s: Shape) -> dict[str, Any]:
    """A step in a CUDA graph: the same bits, and its time."""
    _, step = step_of(s)
    expected = step()
    if DRY:
        return dict(ms=1e3 * seconds(step))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return dict(graph_repeats=same, ms=1e3 * seconds(graph.replay))


def main(record: Record) -> None:
    for name in MAIN[:2]:
        for what, measure in {"waits": waited, "graph": replayed, "memory": kept}.items():
            tried(record, lambda m=measure, n=name: m(SHAPES[n]), layer="ours", shape=name, kind=what)
