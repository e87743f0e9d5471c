"""Measure tiles on this device and write the table that `experts(table=...)` reads. Never runs by itself."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import product
from pathlib import Path

import torch
from triton.errors import TritonError

from fmoe_kernels.host import configs
from fmoe_kernels.host.check import FLOATS, GATED, check_activation, check_index, check_numbers, say
from fmoe_kernels.host.configs import Config, field_problem
from fmoe_kernels.host.launch import Act, Tiling, check_runs
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.up import up

SHARED = 232448  # bytes of shared memory that a program may have, on the largest devices
HALVES = {"up": 2}  # tiles of weights, and of sums, for one column block


def candidates(kernel: str, tma: bool) -> list[Config]:
    """Tiles worth timing: sizes that peers' tables hold, if their operands fit in shared memory and sums in registers.

    What does not launch all the same is left out when it is tried.
    """
    sizes = [(16, 64), (16, 128), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256)]
    halves, made = HALVES.get(kernel, 1), []
    for (rows, columns), depth, warps, stages in product(sizes, (64, 128), (4, 8), (3, 4)):
        sums = rows * columns * halves / (32 * warps)  # registers of a thread
        ctas = 2 if warps == 4 and rows > 16 else 1
        fits = 2 * stages * depth * (rows + halves * columns) * ctas <= SHARED and 8 <= sums <= 128
        if fits and depth == (128 if rows == 16 else 64) and not (rows == 16 and kernel == "dw"):
            parts = 4 if kernel == "dact" and rows > 16 else 2 if rows * columns >= 8192 else 1
            made.append(Config(rows, columns, depth, warps, stages, parts, 8, ctas, swap=tma and rows < 64, tma=tma))
            if kernel == "gmm" and tma and rows == 128:
                made.append(made[-1]._replace(flatten=True))
    return made


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
    limit: float = 60.0,
) -> dict[str, dict[str, float]]:
    """Writes to path the shipped table with the fastest tiles for [n_tokens, dim] x [n_experts, dim, width] layers.

    Returns {kernel: {str(config): seconds}}; what cannot be launched is left out. A file that is already at path is
    taken further, so that several shapes go into one table; it is written after each kernel. among: the tiles to try.
    They are compiled side by side, the table's own first, and timed by events on the device; a kernel takes a quarter
    of `limit` seconds, after which no more are compiled or timed, but one. Raises ValueError for arguments that do not
    fit, and RuntimeError where no tiles of a kernel launch.
    """
    for name, n in dict(n_tokens=n_tokens, dim=dim, width=width, n_experts=n_experts, top_k=top_k).items():
        check_index("tune", name, n, 1, "a size of the layer")
    given = None if among is None else _tiles(among)
    _check(path, n_experts, top_k, activation, dtype, limit)
    where = _where(device)
    arch = configs.architecture(where)
    table = configs.load(str(path)) if Path(path).exists() else configs.load()
    table = {a: {k: dict(buckets) for k, buckets in kernels.items()} for a, kernels in table.items()}
    table.setdefault(arch, {k: dict(b) for k, b in table[configs.nearest(arch, table)].items()})
    tma = table[arch]["up"]["large"].tma
    rows, timings, began = n_tokens * top_k, {}, time.monotonic()
    depths = {"up": dim, "gmm": width, "dact": dim, "dw": rows // n_experts}
    with torch.accelerator.device_index(where.index):  # events and sleeps go to the current device
        calls = _calls(n_tokens, dim, width, n_experts, top_k, activation, dtype, where)
        for i, (kernel, call) in enumerate(calls.items(), 1):
            buckets = table[arch][kernel]
            bucket = configs.bucket(dtype, rows, n_experts, depths[kernel], False)
            shipped = buckets.get(bucket, buckets["large"])
            tries = [*dict.fromkeys((shipped, *candidates(kernel, tma)))] if given is None else given
            seconds = _timed(call, tries, where, began + limit * i / len(calls))
            if not seconds:
                raise RuntimeError(f"tune: none of {len(tries)} tiles of {kernel} launches on {arch}")
            buckets[bucket] = min(seconds, key=lambda c: seconds[c])
            timings[kernel] = {str(c): s for c, s in seconds.items()}
            _write(table, Path(path))
    return timings


def _check(path: object, n_experts: int, top_k: int, activation: str, dtype: object, limit: float) -> None:
    """Raises ValueError, before anything is measured, for what could not be, or could not be written."""
    if top_k > n_experts:
        raise ValueError(f"tune: top_k is {top_k}, expected at most n_experts={n_experts}")
    check_activation("tune", activation)
    if dtype not in FLOATS:
        raise ValueError(f"tune: dtype is {dtype!r}, expected {say(FLOATS)}")
    check_numbers("tune", limit=limit)
    if not limit >= 0:
        raise ValueError(f"tune: limit is {limit!r}, expected seconds, 0 or more")
    if not isinstance(path, str | Path) or "\0" in str(path):
        raise ValueError(f"tune: path is {path!r}, expected the path of a file, to be written")
    if Path(path).is_dir() or not os.access(Path(path) if Path(path).exists() else Path(path).parent, os.W_OK):
        raise ValueError(
            f"tune: path is {str(path)!r}, which cannot be written, expected a file in a folder that exists"
        )


def _tiles(among: object) -> list[Config]:
    """among as a list. Of sizes that no kernel can have, none launches: those are left out when they are tried."""
    tiles = list(among) if isinstance(among, Iterable) else []
    for c in tiles or [among]:
        told = "expected some fmoe_kernels.host.configs.Config"
        if not isinstance(c, Config):
            raise ValueError(f"tune: among has {c!r:.60}, {told}")
        for name, n in c._asdict().items():
            if (problem := field_problem(name, n)) and problem != "a power of two":
                raise ValueError(f"tune: among has a Config of {name} = {n!r:.60}, expected {problem}")
    return tiles


def _where(device: object) -> torch.device:
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda") or (found.index or 0) >= max(torch.accelerator.device_count(), 1):
        raise ValueError(f"tune: device is {device!r}, expected a GPU that is here, such as 'cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"tune: device is {device!r}, and there is no GPU")
    check_runs(device=torch.empty(0, device=found))
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def _write(table: configs.Table, path: Path) -> None:
    plain = {
        a: {k: {b: c._asdict() for b, c in buckets.items()} for k, buckets in ks.items()} for a, ks in table.items()
    }
    path.write_text(json.dumps(plain, indent=1) + "\n")
    configs.load.cache_clear()


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


def _timed(
    call: Callable[[Config], object], tries: list[Config], device: torch.device, until: float
) -> dict[Config, float]:
    """The seconds of those that this device can run: of the first, and of others until then."""
    seconds: dict[Config, float] = {}
    for c in _launched(call, tries, device, until):
        if not seconds or time.monotonic() < until:
            seconds[c] = _seconds(partial(call, c), device)
    return seconds


def _launched(
    call: Callable[[Config], object], tries: list[Config], device: torch.device, until: float
) -> list[Config]:
    """Those that this device can run, each compiled and run once; side by side, but for the interpreter.

    After `until` no further one is begun, but the first.
    """

    def launches(c: Config) -> bool:
        try:
            call(c)
        except (TritonError, RuntimeError):
            return False
        return True

    workers = 1 if device.type == "cpu" else min(14, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        begun = {c: pool.submit(launches, c) for c in tries}
        wait(begun.values(), until - time.monotonic())
        late = {c for i, (c, one) in enumerate(begun.items()) if i and one.cancel()}
        return [c for c, one in begun.items() if c not in late and one.result()]


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median time of a call between two events, with nothing of the host's in it; on a CPU, once by the clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    times = []
    for _ in range(repeats):
        torch.cuda._sleep(1_000_000)  # until all of the call is queued
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
