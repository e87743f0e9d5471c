"""How fast quantised tensors are decoded, against copying what comes out.

    python bench/codecs.py [--mb 128] [--threads 2] [--rounds 7] [--json FILE]

For every format: the time to copy the decoded bf16 tensor into storage that exists (memcpy), and the time to decode it
from its codes and scales into the same storage, in turns in one process; medians over rounds, of the ratio of
neighbours. 1.0 is the speed of a copy; decoding also reads the codes and checks the scales. Encoding is timed once.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fmoe.codecs.formats import FORMATS, Format
from fmoe.types import bits


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(f: Format, mb: int, rounds: int) -> dict[str, float]:
    """One format: GB/s of decoded bf16, and its ratio to memcpy's."""
    E, C = (8, 2048) if f.each or f.grouped else (0, 4096)
    R = mb * 10**6 // 2 // C // max(E, 1) // 128 * 128
    made = torch.Generator().manual_seed(0)
    weight = torch.randn((E, R, C) if E else (R, C), generator=made).bfloat16()
    weight = weight.mT.contiguous().mT if f.transposed else weight
    started = time.perf_counter()
    codes, scale = f.encode(weight)
    encoding = time.perf_counter() - started
    decoded = f.decode(codes, scale)
    storage = torch.empty_like(decoded.mT).mT if f.transposed else torch.empty_like(decoded)
    again = f.encode(decoded, scale)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, (codes, scale), strict=True)), f.name
    copies, decodes = [], []
    for _ in range(rounds + 1):  # the first one warms up
        copies.append(timed(lambda: storage.copy_(decoded)))
        decodes.append(timed(lambda: f.decode(codes, scale, out=storage)))
    ratios = [c / d for c, d in zip(copies[1:], decodes[1:], strict=True)]
    size = decoded.nbytes / 1e9
    return {
        "memcpy_gbs": size / statistics.median(copies[1:]),
        "decode_gbs": size / statistics.median(decodes[1:]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "encode_gbs": size / encoding,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=128, help="of decoded bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="a format")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {n: measure(f, args.mb, args.rounds) for n, f in FORMATS.items() if args.only in (None, n)}
    print(f"{'format':<20}{'memcpy':>9}{'decode':>9}{'ratio':>8}{'from':>7}{'to':>7}{'encode':>9}   GB/s of bf16")
    for name, r in rows.items():
        print(f"{name:<20}{r['memcpy_gbs']:9.2f}{r['decode_gbs']:9.2f}{r['ratio']:8.2f}"
              f"{r['ratio_least']:7.2f}{r['ratio_most']:7.2f}{r['encode_gbs']:9.2f}")  # fmt: skip
    if args.json:
        facts = {"torch": torch.__version__, "threads": args.threads, "mb": args.mb, "formats": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
