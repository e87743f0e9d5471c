"""Experts on a CPU against Transformers' own: eager, batched_mm and grouped_mm, forward, and forward and backward.

    python bench/experts.py --json bench/results/experts.json          the whole table
    python bench/experts.py --tokens 1 16 --experts 8 --rounds 20      some of it
    python bench/experts.py --model                                    a tiny Qwen3-MoE: generate, and a training step
    python bench/experts.py --codes --tokens 1 16 512                  experts in codes against decoding all first

Weights and routing are the same; all run in one process in turns, and what counts is the ratio of their median times;
`products` is that of torch.mm alone (`layer/floor.py`).
Clock: processor time of one thread, since a machine that others use too counts what they take as ours; `--wall` takes
the time of day. Weights lie as Hugging Face's files have them, [out, in], or natively, [in, out].
"""

import argparse
import copy
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from layer import codes
from layer.floor import products
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe as theirs

from fmoe import MoEConfig, Routing, experts

D = 1024
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
WANTED = {"forward": 0.95, "both": 0.8}
Run = Callable[[Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """What Transformers' functions ask of a module, swiglu without biases."""

    has_gate, has_bias, has_post_expert_norm, is_concatenated, _is_expert_parallel = True, False, False, True, False

    def __init__(self, E: int, I: int, dtype: torch.dtype, native: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = E, native
        shape = lambda i, o: (E, i, o) if native else (E, o, i)
        self.gate_up_proj = nn.Parameter((torch.randn(shape(D, 2 * I)) / D**0.5).to(dtype))
        self.down_proj = nn.Parameter((torch.randn(shape(I, D)) / I**0.5).to(dtype))

    def _apply_gate(self, u: Tensor) -> Tensor:
        g, v = u.chunk(2, -1)
        return F.silu(g) * v

    def native(self) -> dict[str, Tensor]:
        turn = (lambda p: p) if self.is_transposed else (lambda p: p.mT)
        return {"gate_and_up_projs": turn(self.gate_up_proj), "down_projs": turn(self.down_proj)}

    def eager(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The loop that Transformers' models are written with."""
        y = torch.zeros_like(x)
        mask = F.one_hot(indices, self.num_experts).permute(2, 1, 0)
        linear = torch.matmul if self.is_transposed else F.linear
        for e in mask.sum((-1, -2)).nonzero().flatten():
            k, token = torch.where(mask[e])
            h = linear(self._apply_gate(linear(x[token], self.gate_up_proj[e])), self.down_proj[e])
            y.index_add_(0, token, (h * weights[token, k, None]).to(y.dtype))
        return y


def runs(m: Experts, T: int, K: int, indices: Tensor) -> dict[str, Run]:
    E, I = m.num_experts, m.native()["down_projs"].shape[1]
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, dtype=m.down_proj.dtype)
    found: dict[str, Run] = {
        "fmoe": lambda x, w: experts(m.native(), x, Routing(indices, w), config),
        "eager": lambda x, w: m.eager(x, indices, w),
        "grouped_mm": lambda x, w: theirs.grouped_mm_experts_forward(m, x, indices, w),
    }
    if T * K <= 128:  # it copies a weight for each of T K rows
        found["batched_mm"] = lambda x, w: theirs.batched_mm_experts_forward(m, x, indices, w)
    return found


def both(m: Experts, run: Run, x: Tensor, w: Tensor) -> list[Tensor]:
    """y, and every gradient of the sum of its squares, as a step of training leaves them."""
    m.zero_grad(set_to_none=True)
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = run(x, w)
    y.float().square().sum().backward()
    return [y.detach(), *(t.grad for t in (x, w, m.gate_up_proj, m.down_proj) if t.grad is not None)]


def medians(
    calls: dict[str, Callable[[], Any]], clock: Callable[[], float], rounds: int, limit: float
) -> dict[str, float]:
    """The median time of each, in turns; after `limit` seconds, and four rounds, no further one begins.

    The order of a round is drawn: whoever always came after one that copies weights would find none in a cache. Who
    took ten times what most did in the first runs no more.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + limit
    draw = random.Random(0)
    for n in range(rounds):
        if n == 1:
            slow = 10 * statistics.median(t[0] for t in times.values())
            calls = {name: call for name, call in calls.items() if times[name][0] <= slow}
        for name in draw.sample([*calls], len(calls)):
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
        if n >= 3 and time.perf_counter() > end:
            break
    return {name: statistics.median(t) for name, t in times.items()}


def measure(T: int, E: int, K: int, dtype: torch.dtype, native: bool, args: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    m, x = Experts(E, args.width, dtype, native), torch.randn(T, D).to(dtype)
    top = torch.randn(T, E).topk(K)
    weights, mine = top.values.softmax(-1).to(dtype), runs(m, T, K, top.indices)
    right = both(m, mine["grouped_mm"], x, weights)
    for found, expected in zip(both(m, mine["fmoe"], x, weights), right, strict=True):
        off = float((found.double() - expected.double()).norm() / expected.double().norm())
        assert off <= CLOSE[dtype], f"not the numbers of grouped_mm: relative norm of the difference {off}"
    row: dict[str, Any] = dict(T=T, E=E, K=K, I=args.width, dtype=str(dtype).removeprefix("torch."))
    row["order"] = "native" if native else "HF"
    clock = time.perf_counter if args.wall else time.process_time
    rows = [x[(top.indices == e).any(-1)] for e in range(E)]
    floor = products(rows, m.gate_up_proj.detach(), m.down_proj.detach(), native)
    for what in WANTED:
        if what == "forward":
            calls = {name: (lambda run=run: torch.no_grad()(run)(x, weights)) for name, run in mine.items()}
        else:
            calls = {name: (lambda run=run: both(m, run, x, weights)) for name, run in mine.items()}
        took = medians(calls | floor[what], clock, args.rounds, args.limit)
        best = min(mine.keys() - {"fmoe"}, key=took.__getitem__)
        row |= {what: took["fmoe"] / took[best], f"{what}_best": best, f"{what}_ms": 1e3 * took["fmoe"]}
        row[f"{what}_products"] = min(took[name] for name in floor[what]) / took[best]
    return row


def model(args: Any) -> Iterator[dict[str, Any]]:
    """A tiny Qwen3-MoE: generate, and a training step."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import fmoe

    fmoe.integrations.transformers.register()
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, head_dim=32)
    sizes |= dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, num_experts=32)
    whole = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=4)).eval()
    made = {how: copy.deepcopy(whole) for how in ("fmoe", "grouped_mm")}
    for how, one in made.items():
        one.set_experts_implementation(how)
    ids = torch.randint(1, 512, (4, 64))

    def generate(how: str) -> None:
        made[how].generate(ids[:1], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    def train(how: str) -> None:
        made[how].zero_grad(set_to_none=True)
        made[how](ids, labels=ids, use_cache=False).loss.backward()

    clock = time.perf_counter if args.wall else time.process_time
    for what, call in {"generate": generate, "training step": train}.items():
        calls = {how: (lambda how=how, call=call: call(how)) for how in made}
        took = medians(calls, clock, args.rounds, args.limit * 4)
        yield {"model": "qwen3_moe", "what": what, "ratio": took["fmoe"] / took["grouped_mm"]}


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)


def finish(rows: list[dict[str, Any]], title: str, path: Path | None) -> None:
    show(rows, title)
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--chosen", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--width", type=int, default=512, help="I of an expert")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for a cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--codes", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = (torch.float32, torch.bfloat16)
    if args.codes:
        clock = time.perf_counter if args.wall else time.process_time
        finish(
            list(codes.rows(args, medians, clock)), "time on codes over that of decoding everything first", args.json
        )
        return
    cells = itertools.product(args.tokens, args.experts, args.chosen, dtypes, (False, True))
    rows: list[dict[str, Any]] = []
    for row in model(args) if args.model else (measure(*cell, args) for cell in cells if cell[2] <= cell[1]):
        rows.append(row)
        if args.json:  # whatever ends a long run, what it has measured stays
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    finish(rows, "time of fmoe over that of the best of Transformers' own", args.json)
    for what, wanted in {} if args.model else WANTED.items():
        ratios = [row[what] for row in rows]
        held = sum(r <= wanted for r in ratios)
        free = sum(row[f"{what}_products"] <= wanted for row in rows)
        print(
            f"{what}: geometric mean {statistics.geometric_mean(ratios):.2f}, {held} of {len(rows)} at most {wanted};"
        )
        print(f"the products alone take at most that in {free}")


if __name__ == "__main__":
    main()
