"""What the GPU measurements share: shapes, random layers, timing, counting.

Shapes are those of published models and papers. FLOPs follow everybody's convention: a gated layer does 6 T K D I
forward and twice that backward. Data is random (zeros run faster than life); routing is a softmax's top-k, or skewed.
With FMOE_DRY set everything runs once on the CPU, tiny and in Triton's interpreter: that the scripts work, no figures.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """T tokens, D width, I expert width, E experts, K of them for each token."""

    T: int
    D: int
    I: int
    E: int
    K: int

    @property
    def forward_flops(self) -> int:
        return 6 * self.T * self.K * self.D * self.I

    @property
    def saved_bytes(self) -> int:
        """x, z, the routing and its weights, in bf16."""
        return 2 * self.T * self.D + self.T * self.K * (4 * self.I + 24)


DRY = bool(os.environ.get("FMOE_DRY"))
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16  # the interpreter's products of bf16 are wrong

SHAPES = {
    "qwen3-30b 32k": Shape(32768, 2048, 768, 128, 8),
    "qwen3-30b 8k": Shape(8192, 2048, 768, 128, 8),
    "qwen3-30b 1k": Shape(1024, 2048, 768, 128, 8),
    "qwen3-235b": Shape(32768, 4096, 1536, 128, 8),
    "qwen3-next": Shape(32768, 2048, 512, 512, 10),
    "qwen3.5-35b": Shape(32768, 2048, 512, 256, 8),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
    "sonic-7b a": Shape(24576, 1536, 256, 128, 8),
    "sonic-30b b": Shape(32768, 4096, 512, 128, 8),
    "sonic-120b b": Shape(32768, 4096, 1024, 128, 8),
    "deepseek-v3": Shape(16384, 7168, 2048, 256, 8),
    "gpt-oss-20b": Shape(32768, 2880, 2880, 32, 4),
    "mixtral-8x7b": Shape(16384, 4096, 14336, 8, 2),
}
DECODE = {f"qwen3-30b T={T}": Shape(T, 2048, 768, 128, 8) for T in (1, 4, 16, 64, 256)}
SWEPT = ("qwen3-30b 32k", "qwen3-30b 1k", "qwen3-30b T=16")  # one shape of each class of tiles
if DRY:
    SHAPES, DECODE, SWEPT = {"tiny": Shape(24, 32, 16, 4, 2)}, {"tiny T=1": Shape(1, 32, 16, 4, 2)}, ("tiny T=1",)


def layer(s: Shape, dtype: torch.dtype = DTYPE, skew: bool = False) -> tuple[Tensor, ...]:
    """(x, indices, weights, w_up, w_down) on the GPU; weights stored [out, in], seen [in, out]."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(shape, device=DEVICE, dtype=dtype)
    scores = torch.randn(s.T, s.E, device=DEVICE)
    if skew:  # Zipf: expert e is drawn as often as 1 / (e + 1)
        scores -= torch.arange(1, s.E + 1, device=DEVICE).log()
    weights, indices = scores.softmax(-1).topk(s.K)
    return new(s.T, s.D), indices, weights, new(s.E, 2 * s.I, s.D).mT / s.D**0.5, new(s.E, s.D, s.I).mT / s.I**0.5


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The median time of a call on the device, its L2 cache flushed before each."""
    if DRY:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    for _ in range(3):
        call()
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def tried(record: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record with what was measured, or with why it could not be."""
    try:
        return record | measure()
    except Exception as error:  # a peer that is missing or fails is a result, not the end of the run
        return record | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def device() -> dict[str, Any]:
    import triton

    versions = dict(torch=torch.__version__, triton=triton.__version__)
    if DRY:
        return dict(device="none: a dry run", multiprocessors=0, **versions)
    found = torch.cuda.get_device_properties(0)
    return dict(device=found.name, multiprocessors=found.multi_processor_count, **versions)


def main(doc: str | None, measure: Callable[[argparse.Namespace], list[dict[str, Any]]], **options: Any) -> None:
    """Prints each record, and writes {device, records} where --json says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    arguments = parser.parse_args()
    records = measure(arguments)
    for record in records:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**device(), "records": records}, indent=1) + "\n")
