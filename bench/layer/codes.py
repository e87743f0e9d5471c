"""Experts in codes against decoding everything first: time, memory and the bytes of weights that are read.

`python bench/experts.py --codes` prints the table. For each format and number of tokens, in turns: `fmoe.experts` on
codes, decoding all experts and then multiplying, and multiplying alone, of experts decoded before. Memory is what the
process holds at most during a call over what it held before (VmHWM over VmRSS of Linux): rows and scratch included.
Weights read: codes and scales of what is decoded, and what of the decoded is multiplied.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmoe import MoEConfig, Routing, experts
from fmoe.backends.held import stacks
from fmoe.codecs.foreign import twofold
from fmoe.codecs.formats import FORMATS

E, K, D, I = 32, 2, 1024, 512


def drawn(fmt: str) -> dict[str, Tensor]:
    """Codes and scales of random weights, as fmoe.load(quantized="keep") has them."""
    f, made = FORMATS[fmt], {}
    for name, (k, m) in {"gate_and_up_projs": (D, 2 * I), "down_projs": (I, D)}.items():
        each = []
        for _ in range(E):
            weight = torch.randn(m, k) / k**0.5
            if f.second:
                each.append(twofold.encode(f, weight))
            else:
                codes, scale = f.encode(weight.mT if f.transposed else weight)
                each.append((codes.flatten(-2) if f.grouped else codes, scale))
        for end, parts in zip(("", f.beside, f"{f.beside}_second"), zip(*each, strict=True), strict=False):
            made[name + end] = torch.stack(parts).mT
    return made


def peak(call: Callable[[], Any]) -> int:
    """The bytes that a call holds at most over what was held before it."""
    call()  # tables that are made once
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, so that it counts when it is taken again
    told = lambda name: 1024 * int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    Path("/proc/self/clear_refs").write_text("5")
    before = told("VmRSS")
    call()
    return max(0, told("VmHWM") - before)


def measure(fmt: str, T: int, args: Any, median: Callable[..., dict[str, float]], clock: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)
    codes, x = drawn(fmt), torch.randn(T, D).bfloat16()
    routing = Routing(torch.rand(T, E).topk(K).indices, torch.rand(T, K))

    def decode() -> dict[str, Tensor]:
        made = {}
        for name, held in stacks(codes, config, x.dtype).items():
            _, k, m = held.shape
            whole = torch.empty(E, m, k, dtype=x.dtype)
            for e in range(E):
                whole[e] = held[e].mT
            made[name] = whole.mT
        return made

    def run(params: dict[str, Tensor], back: bool) -> Tensor:
        x_ = x.detach().requires_grad_(back)
        y = experts(params, x_, routing, config)
        if back:
            y.float().square().sum().backward()
        return y.detach()

    before = decode()
    assert torch.equal(run(codes, False), run(before, False))
    row: dict[str, Any] = {"format": fmt, "T": T, "used": len(routing.indices.unique())}
    ways = {"codes": lambda back: run(codes, back), "first": lambda back: run(decode(), back)}
    for what, back in (("forward", False), ("both", True)):
        calls = {n: (lambda way=way, back=back: way(back)) for n, way in ways.items()}
        took = median(calls | {"plain": lambda back=back: run(before, back)}, clock, args.rounds, args.limit)
        row |= {what: took["codes"] / took["first"], f"{what}_plain": took["codes"] / took["plain"]}
        row |= {f"{what}_ms": 1e3 * took["codes"]}
    row |= {f"memory_{n}": peak(lambda way=way: way(True)) for n, way in ways.items()}
    one = sum(t.nbytes for t in codes.values()) // E
    decoded = 2 * 3 * D * I
    return row | {"read_codes": row["used"] * (one + decoded), "read_first": E * one + row["used"] * decoded}


def rows(args: Any, median: Callable[..., dict[str, float]], clock: Any) -> Iterator[dict[str, Any]]:
    for fmt in ("fp8 blocks", "mxfp4 blocks", "nvfp4", "int4"):
        for T in args.tokens:
            yield measure(fmt, T, args, median, clock)
