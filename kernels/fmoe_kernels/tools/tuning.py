"""Measure tiles on this device and write the table that `experts(table=...)` reads. Never runs by itself."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import torch
from triton.errors import TritonError

from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.scalars import GATED
from fmoe_kernels.programs.up import up


def candidates(tma: bool) -> list[Config]:
    """Tiles worth timing: sizes that peers' tables hold; those that do not fit the device fail to launch."""
    sizes = product((16, 64, 128), (64, 128, 256), (32, 64, 128), ((4, 1), (8, 1), (4, 2)), (2, 3, 4), (1, 2, 4))
    return [
        Config(rows, columns, depth, warps, stages, parts, 8, ctas, swap=tma and rows < 64, tma=tma)
        for rows, columns, depth, (warps, ctas), stages, parts in sizes
        if 1024 <= rows * columns <= 32768 and warps * 4096 >= rows * columns and columns // parts >= 32
    ]


def tune(
    path: str | Path,
    *,
    n_tokens: int,
    dim: int,
    width: int,
    n_experts: int,
    top_k: int,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    among: Iterable[Config] | None = None,
) -> dict[str, dict[str, float]]:
    """Writes to path the shipped table with the fastest tiles for [n_tokens, dim] x [n_experts, dim, width] layers.

    Returns {kernel: {str(config): seconds}}; what cannot be launched is left out. A file that is already at path is
    taken further, so that several shapes go into one table. among: the tiles to try. Raises RuntimeError where no
    tiles of a kernel launch.
    """
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    arch = configs.architecture(where)
    table = configs.load(str(path)) if Path(path).exists() else configs.load()
    table = {a: {k: dict(buckets) for k, buckets in kernels.items()} for a, kernels in table.items()}
    table.setdefault(arch, {k: dict(b) for k, b in table[configs.nearest(arch, table)].items()})
    tries = list(candidates(table[arch]["up"]["large"].tma) if among is None else among)
    rows, timings = n_tokens * top_k, {}
    depths = {"up": dim, "gmm": width, "dact": dim, "dw": rows // n_experts}
    for kernel, call in _calls(n_tokens, dim, width, n_experts, top_k, activation, dtype, where).items():
        seconds = {c: s for c in tries if (s := _seconds(call, c)) is not None}
        if not seconds:
            raise RuntimeError(f"tune: none of {len(tries)} tiles of {kernel} launches on {arch}")
        best = min(seconds, key=lambda c: seconds[c])
        table[arch][kernel][configs.bucket(dtype, rows, n_experts, depths[kernel], False)] = best
        timings[kernel] = {str(c): s for c, s in seconds.items()}
    plain = {
        a: {k: {b: c._asdict() for b, c in buckets.items()} for k, buckets in ks.items()} for a, ks in table.items()
    }
    Path(path).write_text(json.dumps(plain, indent=1) + "\n")
    configs.load.cache_clear()
    return timings


def _calls(
    T: int, D: int, I: int, E: int, K: int, activation: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[Config], object]]:
    """One launch of each kernel on random data (zeros would run faster than life)."""
    U = 2 * I if GATED[activation] else I
    x, dy = (torch.randn(T, D, dtype=dtype, device=device) for _ in range(2))
    w_up = torch.randn(E, U, D, dtype=dtype, device=device).mT
    w_down = torch.randn(E, D, I, dtype=dtype, device=device).mT
    weights = torch.rand(T * K, device=device)
    r = make_route(torch.rand(T, E, device=device).topk(K).indices, None, E)
    act, dw_out = Act(activation, 1.702, 7.0), torch.empty_like(w_down)
    a, z = up(x, w_up, None, weights, r, act, Tiling(), True)
    assert z is not None
    return {
        "up": lambda c: up(x, w_up, None, weights, r, act, Tiling(only=c), True),
        "gmm": lambda c: gmm(a, w_down, None, None, r, Tiling(only=c)),
        "dact": lambda c: dact(dy, w_down, z, weights, r, act, Tiling(only=c)),
        "dw": lambda c: dw(a, dy, r, dw_out, Tiling(only=c)),
    }


def _seconds(call: Callable[[Config], object], config: Config, repeats: int = 10) -> float | None:
    """The median time of a launch, or None where this device cannot run it."""
    try:
        call(config)
    except (TritonError, RuntimeError):
        return None
    times = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        call(config)
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
