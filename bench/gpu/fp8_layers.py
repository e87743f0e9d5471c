"""Products in FP8 against bf16, forward, with weights as a checkpoint in FP8 has them."""

from typing import Any

import torch
from common import DRY, MAIN, SHAPES, Record, Shape, layer, seconds, tried
from fmoe_kernels import products
from fmoe_kernels.programs import fp8


def both(s: Shape, depth: int, width: int) -> dict[str, Any]:
    """Sorted rows [T K, depth] times [E, depth, width]."""
    x, indices, *_ = layer(s._replace(D=depth, I=16))
    rows = x.repeat_interleave(s.K, 0)
    ends = torch.bincount(indices.flatten(), minlength=s.E).cumsum(0).int()
    w = torch.randn(s.E, width, depth, device=x.device, dtype=x.dtype).mT / depth**0.5
    q = w.to(fp8.E4M3)
    scale = torch.ones(s.E, -(-width // 128), -(-depth // 128), device=x.device).mT
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
        sizes = {"tiny": (Shape(6, 32, 16, 2, 1), 32, 16)}
    else:
        sizes = {f"{n} {k}": (SHAPES[n], *wide) for n in MAIN for k, wide in _products(SHAPES[n]).items()}
    for name, (s, depth, width) in sizes.items():
        tried(record, lambda s=s, d=depth, w=width: both(s, d, w), kernel="gmm fp8", shape=name)
        if not DRY:
            torch.cuda.empty_cache()


def _products(s: Shape) -> dict[str, tuple[int, int]]:
    return {"up": (s.D, 2 * s.I), "down": (s.I, s.D)}
