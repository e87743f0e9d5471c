"""What the GPU measurements share: shapes, random layers, timing by events, and records that survive a kill.

Shapes are those of published models and papers. FLOPs follow everybody's convention: a gated layer does 6 T K D I
forward and twice that backward. Data is random (zeros run faster than life); routing is a softmax's top-k, or skewed.
With FMOE_DRY set everything runs once on the CPU, tiny and in Triton's interpreter: that the scripts work, no figures.
"""

import json
import mmap
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
        return 2 * self.T * self.D + self.T * self.K * (4 * self.I + 28)


DRY = bool(os.environ.get("FMOE_DRY"))
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16  # the interpreter's products of bf16 are wrong

SHAPES = {  # the first three first: they are what the goals are about
    "qwen3-30b 32k": Shape(32768, 2048, 768, 128, 8),
    "sonic-120b": Shape(32768, 4096, 1024, 128, 8),
    "mixtral 8k": Shape(8192, 4096, 14336, 8, 2),
    "qwen3-30b 1k": Shape(1024, 2048, 768, 128, 8),
    "sonic-30b": Shape(32768, 4096, 512, 128, 8),
    "gpt-oss-20b": Shape(32768, 2880, 2880, 32, 4),
    "deepseek-v3": Shape(16384, 7168, 2048, 256, 8),
}
DECODE = {f"qwen3-30b T={T}": Shape(T, 2048, 768, 128, 8) for T in (1, 4, 16, 64, 256)}
if DRY:
    SHAPES, DECODE = {"tiny": Shape(4, 16, 16, 2, 1)}, {"tiny T=1": Shape(1, 16, 16, 2, 1)}
MAIN = list(SHAPES)[:3]

Record = Callable[..., None]


def records(step: str) -> Record:
    """record(shape=.., kernel=.., ms=..): one line of records.jsonl under OUT, written at once."""
    path = Path(os.environ["OUT"]) / "records.jsonl"

    def record(**values: Any) -> None:
        line = json.dumps(dict(step=step, dtype=str(DTYPE).removeprefix("torch."), at=time.time()) | values)
        with path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    return record


class Progress:
    """What a step tries right now, and how many it has tried: shared with what is forked, so it outlives a crash."""

    LOST = 77  # the exit status of a process whose device takes no more

    def __init__(self) -> None:
        self.shared, self.seen, self.skipped = mmap.mmap(-1, 8192), 0, 0

    def write(self, count: int, what: dict[str, Any] | None) -> None:
        self.shared[:] = json.dumps([count, what]).encode().ljust(8192)

    def read(self) -> tuple[int, dict[str, Any] | None]:
        text = bytes(self.shared).rstrip(b"\0 ")
        return tuple(json.loads(text)) if text else (0, None)


PROGRESS = Progress()


def tried(record: Record, measure: Callable[[], dict[str, Any]], **what: Any) -> None:
    """Records what was measured, or the reason why it was not. An error that leaves no device ends the process.

    Another one then goes on behind it: what this step has tried before is skipped.
    """
    PROGRESS.seen += 1
    if PROGRESS.seen <= PROGRESS.skipped:
        return
    PROGRESS.write(PROGRESS.seen, what)
    reason = ""
    try:
        record(**what, **measure())
    except Exception as error:  # a peer that is missing or fails is a result, not the end of the run
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        record(**what, reason=reason)
    PROGRESS.write(PROGRESS.seen, None)
    if reason and not takes_more(reason):
        os._exit(Progress.LOST)


def takes_more(reason: str) -> bool:
    """Does the device still do what it is asked, after this error?"""
    if DRY:
        return "CUDA error" not in reason
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def layer(s: Shape, dtype: torch.dtype = DTYPE, skew: bool = False) -> tuple[Tensor, ...]:
    """(x, indices, weights, w_up, w_down) on the GPU; weights stored [out, in], seen [in, out]."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(shape, device=DEVICE, dtype=dtype)
    scores = torch.randn(s.T, s.E, device=DEVICE)
    if skew:  # Zipf: expert e is drawn as often as 1 / (e + 1)
        scores -= torch.arange(1, s.E + 1, device=DEVICE).log()
    weights, indices = scores.softmax(-1).topk(s.K)
    return new(s.T, s.D), indices, weights, new(s.E, 2 * s.I, s.D).mT / s.D**0.5, new(s.E, s.D, s.I).mT / s.I**0.5


def seconds(call: Callable[[], object], before: Callable[[], object] = lambda: None, budget: float = 0.4) -> float:
    """The median time of a call between two events on the device, its L2 cache flushed, `before` done and not timed.

    A sleep on the device is queued first, so that all of the call is queued before it starts: no host in the figure.
    """
    if DRY:
        before()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    times: list[float] = []
    until = time.perf_counter() + budget
    for i in range(2 + 20):
        before()
        flush.zero_()
        torch.cuda._sleep(5_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) / 1e3] if i > 1 else []
        if len(times) > 2 and time.perf_counter() > until:
            break
    return statistics.median(times)


def leaves(args: tuple[Tensor, ...]) -> list[Tensor]:
    """The arguments of a layer, those that are floating to be differentiated."""
    return [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]


def trained(args: list[Tensor]) -> list[Tensor]:
    return [a for a in args if a.requires_grad]
