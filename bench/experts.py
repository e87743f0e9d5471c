"""Experts forward and backward on a CPU: every backend against loops over experts, E = 64 and K = 8.

Two loops are written out below: for each expert that has tokens, gather, two products, index_add. `seed` takes
`weight[e]`, as the seed does, whose gradient is a dense stack for every expert; `unbind` is the same without that flaw.
All run in one process, in interleaved rounds; what counts is the ratio of medians. Results and gradients are compared
first. Weights are stored either in the native order [E, D, U] or, transposed, in that of Hugging Face's files.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fmoe import MoEConfig, Routing, experts
from fmoe.backends import BACKENDS

SHAPES = [(512, 256, 128), (256, 512, 256)]  # T, D, I
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Run = Callable[[dict[str, Tensor], Tensor, Routing], Tensor]


def looped(ups: Sequence[Tensor], downs: Sequence[Tensor], x: Tensor, routing: Routing) -> Tensor:
    """What the seed's GroupedExperts does on one device, swiglu without biases."""
    y = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(len(ups)):
        token, slot = torch.where(routing.indices == e)
        if token.numel() == 0:
            continue
        gate, up = (x[token] @ ups[e]).chunk(2, -1)
        hidden = (F.silu(gate) * up * routing.weights[token, slot, None]).to(x.dtype)
        y = y.index_add(0, token, (hidden @ downs[e]).float())
    return y.to(x.dtype)


def seed(params: dict[str, Tensor], x: Tensor, routing: Routing) -> Tensor:
    return looped(params["gate_and_up_projs"], params["down_projs"], x, routing)


def unbind(params: dict[str, Tensor], x: Tensor, routing: Routing) -> Tensor:
    return looped(params["gate_and_up_projs"].unbind(), params["down_projs"].unbind(), x, routing)


def step(run: Run, params: dict[str, Tensor], x: Tensor, routing: Routing) -> list[Tensor]:
    """y, and every gradient of the sum of its squares."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    x, weights = x.detach().requires_grad_(), routing.weights.detach().requires_grad_()
    y = run(leaves, x, routing._replace(weights=weights))
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [*leaves.values(), x, weights])]


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(T: int, D: int, I: int, dtype: torch.dtype, hf_order: bool, rounds: int) -> dict[str, object]:
    E, K = 64, 8
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)
    params = {"gate_and_up_projs": torch.randn(E, D, 2 * I) / D**0.5, "down_projs": torch.randn(E, I, D) / I**0.5}
    params = {name: p.to(dtype) for name, p in params.items()}
    if hf_order:
        params = {name: p.mT.contiguous().mT for name, p in params.items()}
    best = torch.randn(T, E).topk(K)
    routing, x = Routing(best.indices, best.values.softmax(-1)), torch.randn(T, D).to(dtype)
    runs: dict[str, Run] = {"seed": seed, "unbind": unbind}
    runs |= {name: lambda p, x, r, name=name: experts(p, x, r, config, backend=name) for name in BACKENDS}
    wanted = step(seed, params, x, routing)
    for name, run in runs.items():
        for found, right in zip(step(run, params, x, routing), wanted, strict=True):
            off = float((found.double() - right.double()).norm() / right.double().norm())
            assert off <= CLOSE[dtype], f"{name} is not the seed's loop: relative norm of the difference {off}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(lambda run=run: step(run, params, x, routing)))
    took = {name: median(t) for name, t in times.items()}
    row: dict[str, object] = {"T": T, "D": D, "I": I, "dtype": str(dtype).removeprefix("torch.")}
    row |= {"order": "HF" if hf_order else "native", "seed_seconds": took["seed"]}
    return row | {f"{name}/{loop}": took[loop] / took[name] for name in BACKENDS for loop in ("seed", "unbind")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        measure(*shape, dtype, hf_order, args.rounds)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for hf_order in (False, True)
    ]
    table = Table(*rows[0], title="experts, forward and backward, E = 64, K = 8: how many times faster than each loop")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
