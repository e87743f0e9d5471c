"""Planning a whole DeepSeek-V3 from metadata, and `from_hf` against a plain `clone()` of the same tensors.

Both sides write to memory that the process already has. Otherwise the ratio says who pays for the page faults, which
depends on what the allocator happened to give back before, and is up to three times the time of the copy.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import fmoe
from fmoe import TensorSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from hf_synthetic import DEEPSEEK_V3_CONFIG, deepseek_v3_keys  # noqa: E402


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = run()
    spent = time.perf_counter() - start
    del kept
    return spent


def keep_freed_memory() -> None:
    """Freed memory stays with the process (glibc: no mmap for large blocks, never trim)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    keep_freed_memory()
    specs = {n: TensorSpec(*spec) for n, spec in deepseek_v3_keys().items()}
    deepseek = fmoe.adapter("deepseek_v3", DEEPSEEK_V3_CONFIG)
    native = deepseek.plan(specs).targets
    rows: list[dict[str, object]] = [
        {
            "what": f"plan {len(specs):,} names",
            "seconds": median(seconds(lambda: deepseek.plan(specs)) for _ in range(7)),
        },
        {
            "what": "plan the way back",
            "seconds": median(seconds(lambda: deepseek.inverse.plan(native)) for _ in range(7)),
        },
    ]

    shapes = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    split = {
        f"layers.0.mlp.experts.{e}.{p}.weight": torch.randn(s).bfloat16()
        for e in range(args.experts)
        for p, s in shapes.items()
    }
    one_by_one, fused = fmoe.adapter("qwen3_moe"), fmoe.adapter("qwen3_moe", layout="fused")
    whole = fused.to_hf(one_by_one.from_hf(split))
    for what, adapter, tensors in (("one by one", one_by_one, split), ("fused", fused, whole)):
        pairs = [
            (
                seconds(lambda t=tensors: {n: x.clone() for n, x in t.items()}),
                seconds(lambda a=adapter, t=tensors: a.from_hf(t)),
            )
            for _ in range(1 + args.rounds)
        ][1:]  # the first one brings the memory
        rows.append(
            {
                "what": f"from_hf, experts {what}, {sum(t.nbytes for t in tensors.values()) / 1e9:.1f} GB",
                "seconds": median(ours for _, ours in pairs),
                "times as fast as clone()": median(clone / ours for clone, ours in pairs),
            }
        )

    table = Table("what", "seconds", "times as fast as clone()")
    for row in rows:
        ratio = row.get("times as fast as clone()")
        table.add_row(str(row["what"]), f"{row['seconds']:.4f}", f"{ratio:.2f}" if ratio else "")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
