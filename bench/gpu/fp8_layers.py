"""Products in FP8 against bf16, forward, with weights as a checkpoint in FP8 has them."""

from typing import Any

import torch
from common import DRY, MAIN, SHAPES, Record, Shape, layer, seconds, tried
from fmoe_kernels import products
from fmoe_kernels.programs import fp8
from torch import Tensor


def operands(s: Shape, depth: int, width: int) -> tuple[Tensor, ...]:
    """(rows [T K, depth], w [E, depth, width], the same in FP8, its scales, where the rows of each expert end)."""
    x, indices, *_ = layer(s._replace(D=depth, I=16))
    rows = x.repeat_interleave(s.K, 0)
    counts = torch.zeros(s.E, device=x.device, dtype=torch.int64)
    ends = counts.scatter_add(0, indices.flatten(), torch.ones_like(indices).flatten()).cumsum(0).int()
    w = torch.randn(s.E, width, depth, device=x.device, dtype=x.dtype).mT / depth**0.5
    scale = torch.ones(s.E, -(-width // 128), -(-depth // 128), device=x.device).mT
    return rows, w, w.to(fp8.E4M3), scale, ends


def both(s: Shape, depth: int, width: int) -> dict[str, Any]:
    """Sorted rows [T K, depth] times [E, depth, width]."""
    rows, w, q, scale, ends = operands(s, depth, width)
    wide = seconds(lambda: products.gmm(rows, w, ends))
    narrow = seconds(lambda: fp8.gmm(rows, q, scale, ends))
    flops = 2.0 * len(rows) * depth * width
    off = (products.gmm(rows, w, ends).float() - fp8.gmm(rows, q, scale, ends).float()).norm()
    apart = (off / products.gmm(rows, w, ends).float().norm()).item()
    return dict(
        bf16_ms=1e3 * wide, fp8_ms=1e3 * narrow, bf16_tflops=flops / wide / 1e12, fp8_tflops=flops / narrow / 1e12,
        speedup=wide / narrow, apart=apart,
    )  # fmt: skip


def main(record: Record) -> None:
    if DRY:
        cases = {"tiny": (Shape(6, 32, 16, 2, 1), 32, 16)}
    else:
        cases = {f"{n} {k}": (SHAPES[n], *wide) for n in MAIN for k, wide in sizes(SHAPES[n]).items()}
    for name, (s, depth, width) in cases.items():
        tried(record, lambda s=s, d=depth, w=width: both(s, d, w), kernel="gmm fp8", shape=name)
        if not DRY:
            torch.cuda.empty_cache()


def sizes(s: Shape) -> dict[str, tuple[int, int]]:
    return {"up": (s.D, 2 * s.I), "down": (s.I, s.D)}
