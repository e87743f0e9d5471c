"""Whole expert layers, forward and forward+backward, ours against others; peak memory, graph capture, host waits.

    python bench/gpu/layers.py [--json FILE] [--shape "qwen3-30b 32k"]

Others: the usual pipeline on torch's grouped_mm, eager and compiled; Transformers' experts with its grouped_mm
implementation; ScatterMoE and Liger where they can be imported. Each must first agree with ours to 2 % in norm.
"""

import argparse
from collections.abc import Callable
from typing import Any

import fmoe_kernels
import torch
from common import DECODE, DEVICE, DRY, DTYPE, SHAPES, Shape, layer, main, seconds, tried
from torch import Tensor
from torch.nn import functional as F

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return fmoe_kernels.experts(x, indices, weights, None, w_up, w_down)


def recompute(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return fmoe_kernels.experts(x, indices, weights, None, w_up, w_down, recompute=True)


def grouped_mm(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Sort, gather, product, activation, product, weight, gather back, sum."""
    T, K = indices.shape
    ids, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(len(w_up), device=x.device), right=True, out_int32=True)
    g, v = F.grouped_mm(x[order // K], w_up, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(g) * v, w_down, offs=ends)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return (rows[inverse].view(T, K, -1) * weights[..., None].to(x.dtype)).sum(1)


def transformers(s: Shape) -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = dict(hidden_size=s.D, moe_intermediate_size=s.I, num_experts=s.E, num_experts_per_tok=s.K)
    config = Qwen3MoeConfig(**sizes)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def call(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        parameters = dict(gate_up_proj=w_up.mT, down_proj=w_down.mT)
        return torch.func.functional_call(module, parameters, (x, indices, weights.to(x.dtype)))

    return call


def scattermoe(s: Shape) -> Layer:
    from scattermoe.mlp import GLUMLP

    mlp = GLUMLP(s.D, s.I, s.E, s.K, activation=torch.nn.SiLU()).to(DEVICE, DTYPE)

    def call(x: Tensor, indices: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        # its output columns are [up, gate]
        swapped = torch.cat([w_up[..., s.I :], w_up[..., : s.I]], -1).mT
        parameters = {"experts.weight": swapped, "output_experts.weight": w_down.mT}
        return torch.func.functional_call(mlp, parameters, (x, weights.to(x.dtype), indices))

    return call


def liger(s: Shape) -> Layer:
    from liger_kernel.ops import LigerFusedMoEFunction

    return lambda x, indices, weights, w_up, w_down: LigerFusedMoEFunction.apply(
        x, w_up.mT, w_down.mT, indices.int(), weights.to(x.dtype)
    )


LAYERS: dict[str, Callable[[Shape], Layer]] = {
    "ours": lambda s: ours,
    "ours, recompute": lambda s: recompute,
    "grouped_mm": lambda s: grouped_mm,
    "grouped_mm, compiled": lambda s: torch.compile(grouped_mm, dynamic=False),
    "transformers": transformers,
    "scattermoe": scattermoe,
    "liger": liger,
}
if DRY:
    del LAYERS["grouped_mm, compiled"]  # fake tensors of grouped_mm are bf16 only


def times(s: Shape, f: Layer, args: tuple[Tensor, ...], expected: Tensor) -> dict[str, Any]:
    """Forward, and forward with backward; TFLOP/s of each and of backward; peak memory above what was there."""
    found = f(*args)
    apart = ((found - expected).norm() / expected.norm()).item()
    if not apart < 0.02:
        raise ValueError(f"differs from ours by {apart:.3g} in norm")
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    dy = torch.randn_like(args[0])
    with torch.no_grad():
        forward = seconds(lambda: f(*args))
    both = seconds(lambda: torch.autograd.grad(f(*leaves), [a for a in leaves if a.requires_grad], dy))
    saved, peak = (0, 0) if DRY else memory(lambda: f(*leaves), [a for a in leaves if a.requires_grad], dy)
    flops, backward = s.forward_flops, max(both - forward, 1e-9)
    return dict(
        forward_ms=1e3 * forward,
        both_ms=1e3 * both,
        forward_tflops=flops / forward / 1e12,
        backward_tflops=2 * flops / backward / 1e12,
        both_tflops=3 * flops / both / 1e12,
        saved_bytes=saved,
        saved_bytes_formula=s.saved_bytes,
        peak_bytes=peak,
    )


def memory(forward: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[int, int]:
    """Bytes (saved by forward for backward, at the peak of both), above what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    saved = torch.cuda.memory_allocated() - before - y.nbytes
    torch.autograd.grad(y, leaves, dy)
    return saved, torch.cuda.max_memory_allocated() - before


def no_waits(s: Shape) -> dict[str, Any]:
    """Forward and backward with host waits forbidden, then in a CUDA graph: replayed bits and time."""
    args = layer(s)
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    dy = torch.randn_like(args[0])
    step = lambda: torch.autograd.grad(ours(*leaves), [a for a in leaves if a.requires_grad], dy)
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
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
    return dict(waits=False, graph_repeats=same, both_ms=1e3 * seconds(graph.replay))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    records = []
    for name, s in (SHAPES | DECODE).items():
        if options.shape not in (None, name):
            continue
        for skew in (False, True) if name == "qwen3-30b 32k" else (False,):
            args = layer(s, skew=skew)
            with torch.no_grad():
                expected = ours(*args)
            for who, make in LAYERS.items():
                one = lambda make=make, s=s, args=args, expected=expected: times(s, make(s), args, expected)
                records.append(tried(dict(shape=name, layer=who, skew=skew), one))
                torch.cuda.empty_cache()
        if not DRY:
            records.append(tried(dict(shape=name, layer="ours, in a CUDA graph"), lambda s=s: no_waits(s)))
    return records


if __name__ == "__main__":
    main(__doc__, measure, shape={})
