"""Dispatchers on real gloo processes of one machine: bytes and seconds of a step, and what the bytes say of more ranks.

    python bench/dispatch.py --json bench/results/dispatch.json

A step is plan, dispatch, combine and their backward, without any products in between. All run in one start of the
ranks, in interleaved rounds. Beside the dispatchers stands all_gather with other ways to add up: `dist.reduce_scatter`,
and what the seed does, an all_reduce of the whole batch. sent: bytes that one rank has to hand over for others. wire:
what the loopback device counted for each rank, with headers and whatever else the machine did.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fmoe import MoEConfig, Routing
from fmoe.dispatch import Dispatcher, all_gather, all_to_all
from fmoe.dispatch.context import Context


def verb(ctx: Context, step: str, rows: Tensor, lengths: list[int]) -> Tensor:
    out = rows.new_empty(lengths[ctx.rank], rows.shape[1])
    dist.reduce_scatter(out, list(rows.split(list(lengths))), group=ctx.group)
    return out


def seed(ctx: Context, step: str, rows: Tensor, lengths: list[int]) -> Tensor:
    dist.all_reduce(rows, group=ctx.group)
    return rows.split(list(lengths))[ctx.rank]


METHODS: dict[str, tuple[Callable[[], Dispatcher], Callable[..., Tensor]]] = {
    "all_to_all": (all_to_all, Context.reduce_scatter),
    "all_gather": (all_gather, Context.reduce_scatter),
    "dist.reduce_scatter": (all_gather, verb),
    "seed": (all_gather, seed),
}
BIG = dict(T=4096, K=8, D=7168)  # tokens of a rank, DeepSeek-V3's layer
LINK = 50e9  # bytes per second out of one rank: 400 Gb/s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shape", type=int, nargs=4, default=[256, 8, 64, 512], metavar=("T", "K", "E", "D"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for R in args.ranks for row in measure(R, args.shape, args.rounds)]
    T, K, E, D = args.shape
    show(f"one step, bf16, T={T} tokens of each rank, K={K}, E={E}, D={D}", rows)
    paper = [project(rows, R, T, K, D) for R in (8, 16, 32, 64, 128, 256, 512, 1024)]
    show(f"on paper: GB that leave a rank, and ms at 50 GB/s; bf16, {BIG}", paper)
    if args.json:
        args.json.write_text(json.dumps({"measured": rows, "projected": paper}, indent=2) + "\n")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)


def measure(R: int, shape: list[int], rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (R, folder, shape, rounds), nprocs=R)
        return json.loads((Path(folder) / "rows").read_text())


def _rank(rank: int, R: int, folder: str, shape: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=R)
    T, K, E, D = shape
    torch.manual_seed(rank)
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=1)
    x = torch.randn(T, D).bfloat16().requires_grad_()
    routing = Routing(torch.rand(T, E).topk(K).indices, torch.rand(T, K, requires_grad=True))
    sent: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    wire: dict[str, list[float]] = {name: [] for name in METHODS}
    grads = {}
    for _ in range(rounds + 1):  # the first warms up, and counts
        for name, (make, Context.reduce_scatter) in METHODS.items():
            with make() as d, Counted() as counted:
                dist.barrier()
                started, before = time.perf_counter(), loopback()
                plan = d.plan(routing, config)
                rows = d.dispatch(x, routing.weights, plan)
                y = d.combine(rows.x * rows.weights[:, None], plan)
                grads[name] = torch.autograd.grad(y.square().sum(), (x, routing.weights))
                dist.barrier()
                seconds[name].append(time.perf_counter() - started)
                wire[name].append((loopback() - before) / R)
            sent[name] = counted.total
    for name in METHODS:
        for found, right in zip(grads[name], grads["all_to_all"], strict=True):
            torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    rows = [
        {
            "ranks": R,
            "dispatcher": name,
            "ms": 1e3 * median(seconds[name][1:]),
            "sent MB": sent[name] / 1e6,
            "wire MB": median(wire[name][1:]) / 1e6,
            "ms / all_to_all": median(seconds[name][1:]) / median(seconds["all_to_all"][1:]),
        }
        for name in METHODS
    ]
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


class Counted:
    """Bytes that this rank hands over for others while it is open."""

    def __enter__(self) -> "Counted":
        self.total, R, rank = 0, dist.get_world_size(), dist.get_rank()
        size = lambda t: t.numel() * t.itemsize
        leaves = {
            "all_to_all_single": lambda out, rows, to, given, **_: size(rows) * (1 - given[rank] / max(sum(given), 1)),
            "all_gather": lambda parts, mine, **_: size(mine) * (R - 1),
            "reduce_scatter": lambda out, parts, **_: sum(map(size, parts)) - size(parts[rank]),
            "all_reduce": lambda whole, **_: 2 * size(whole) * (R - 1) / R,  # a ring
        }
        self.verbs = {name: getattr(dist, name) for name in leaves}

        def watch(name: str) -> Callable[..., None]:
            def call(*args: Any, **kwargs: Any) -> None:
                self.total += leaves[name](*args, **kwargs)
                self.verbs[name](*args, **kwargs)

            return call

        for name in leaves:
            setattr(dist, name, watch(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, verb in self.verbs.items():
            setattr(dist, name, verb)


def loopback() -> float:
    """Bytes that have left by the loopback device."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return float(next(line.split(":")[1].split()[8] for line in lines if line.strip().startswith("lo:")))


def project(rows: list[dict[str, Any]], R: int, T: int, K: int, D: int) -> dict[str, Any]:
    """Measured bytes, for each row that leaves and each of its D numbers, times those of BIG on R ranks."""
    most = max(row["ranks"] for row in rows)
    found: dict[str, Any] = {"ranks": R}
    # how many rows leave a rank: of T K, those whose expert is elsewhere; of T, once for every other rank
    leave = {"all_to_all": lambda T, K, R: T * K * (R - 1) / R, "all_gather": lambda T, K, R: T * (R - 1)}
    leave["seed"] = leave["all_gather"]
    for name, n in leave.items():
        sent = next(1e6 * row["sent MB"] for row in rows if (row["ranks"], row["dispatcher"]) == (most, name))
        total = sent / (n(T, K, most) * D) * n(BIG["T"], BIG["K"], R) * BIG["D"]
        found |= {f"{name} GB": total / 1e9, f"{name} ms": 1e3 * total / LINK}
    return found


if __name__ == "__main__":
    main()
