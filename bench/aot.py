"""Compile every kernel with every shipped tile for GPUs that are not here, and read what the compiler made of it.

    python bench/aot.py [--arch sm_90] [--hot | --brief] [--fits] [--json [FILE]]

A launch on `meta` tensors is caught before it reaches a device, so what is compiled is what would run, specialisations
included. Columns: registers of a thread, bytes spilled, bytes of shared memory, and how often the code has: a matrix
instruction (mma), of which asynchronous on Hopper (wgmma); a bulk tensor copy in and out (tma_load, tma_store); a wait
that leaves work in flight (async_wait). hot: tiles of large shapes, where time goes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from fake_gpu import TARGETS, caught, compiled
from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs import activations, dact, dw, fp8, gmm, route, sums, up
from fmoe_kernels.programs.scalars import GATED, SCALARS
from sass import at_once, counts

SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # sm_80's table also serves sm_86, sm_89
VARIANTS = {
    "up": [*SCALARS, "swiglu bias", "quick_geglu bias"],
    "gmm": ["swiglu", "swiglu bias"],
    "dact": [*SCALARS],
}
HOT = {"large", "narrow"}
OTHERS = [  # tiles that `tune` tries, or is told to, and no table ships
    ("up", Config(128, 64, 64, 4, 3, 2, ctas=2, tma=True)),
    ("gmm", Config(128, 128, 64, 4, 3, 2, ctas=2, tma=True, flatten=True)),
    ("up", Config(128, 128, 64, 8, 3, 2, tma=True, specialised=True)),
    ("gmm", Config(128, 256, 64, 8, 4, 2, tma=True, specialised=True)),
    ("dact", Config(128, 128, 64, 8, 4, 4, tma=True)),
]
Row = tuple[str, str, Config | None, bool, str, torch.dtype]
FIELDS = "kernel arch config hot variant registers spills shared mma wgmma tma_load tma_store async_wait".split()
FIELDS += ["loop", "epilogue", "ctas"]
T, WIDTH, INNER, E, K = 8192, 2048, 768, 128, 8  # Qwen3-30B-A3B


def launches(kernel: str, variant: str, dtype: torch.dtype, config: Config) -> Callable[[], object]:
    """A call that launches this kernel, and others that are ignored.

    variant: an activation, perhaps with ` bias`, perhaps with ` odd`: widths of which no row but the first is aligned.
    """
    act, D, I = variant.split()[0], *((1001, 1003) if "odd" in variant else (WIDTH, INNER))
    U = 2 * I if GATED[act] else I
    new = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    integers = (new(n, dtype=torch.int32) for n in (T * K, T * K, T * K, E + 1))
    r, only, scalar = route.Route(*integers, K), Tiling(only=config), Act(act, 1.702, 7.0)
    x, weights, w_up, w_down = new(T, D), new(T * K, dtype=torch.float32), new(E, U, D).mT, new(E, D, I).mT
    a, z = new(T * K, I), new(T * K, U)
    b_up, b_down = (new(E, U), new(E, D)) if "bias" in variant else (None, None)
    return {
        "up": lambda: up.up(x, w_up, b_up, weights, r, scalar, only, True),
        "gmm": lambda: gmm.gmm(a, w_down, b_down, weights, r, only),
        "dact": lambda: dact.dact(x, w_down, z, weights, r, scalar, only),
        "dw": lambda: dw.dw(a, x, r, new(E, I, D), only),
        "gmm_fp8": lambda: fp8.launch(
            new(T * K, D, dtype=fp8.E4M3),
            new(T * K, D // 128, dtype=torch.float32),
            new(E, U, D, dtype=fp8.E4M3).mT,
            new(E, U // 128, D // 128, dtype=torch.float32).mT,
            dtype,
            r,
            only,
        ),
    }[kernel]


def small(arch: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], object]]:
    """The kernels that have no tiles to choose."""
    new = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    r = route.Route(*(new(n, dtype=torch.int32) for n in (T * K, T * K, T * K, E + 1)), K)
    D, I = WIDTH, INNER
    rows, u, p, ids = new(T * K, D), new(T * K, 2 * I), new(T * K, dtype=torch.float32), new(T, K, dtype=torch.int64)
    partial = new(T * K, 6, dtype=torch.float32)
    quantize = {"quantize": lambda: fp8.quantize_rows(rows)} if fp8.served(arch) else {}
    return quantize | {
        "route": lambda: route.make_route(ids, new(T, dtype=torch.bool), E),
        "tiles": lambda: r.tiles(128),
        "combine": lambda: sums.combine(rows, p, r, T, dtype),
        "bias": lambda: sums.bias_gradient(u, None, r, dtype),
        "dweight": lambda: sums.dweight(partial, rows[:T], new(E, D), r),
        "act_forward": lambda: activations.act_forward._init_fn(u, p, "swiglu", 1.0, 0.0),
        "act_backward": lambda: activations.act_backward._init_fn(u[:, :I], u, p, "swiglu", 1.0, 0.0),
    }


def brief() -> Iterator[Row]:
    """What every run of the tests compiles: on Hopper the tiles of large shapes and of odd widths, once, and OTHERS."""
    for arch, kernel, config, hot, variant, dtype in rows(["sm_90"]):
        large = configs.load()[arch].get(kernel, {}).get("large")
        if (config is not None and config == large and variant == "swiglu") or variant == "swiglu odd":
            yield arch, kernel, config, hot, variant, dtype
    yield from (("sm_90", kernel, config, False, "swiglu", torch.bfloat16) for kernel, config in OTHERS)


def rows(archs: list[str], hot_only: bool = False) -> Iterator[Row]:
    """(arch, kernel, config, hot, variant, dtype): each shipped tile once; hot ones with every activation and bias."""
    for arch in archs:
        for kernel, buckets in configs.load()[arch].items():
            for config in dict.fromkeys(buckets.values()):
                names = {b for b, c in buckets.items() if c == config}
                hot, dtype = bool(names & HOT), torch.float32 if "fp32" in names else torch.bfloat16
                if names != {"odd"} and (hot or not hot_only):
                    variants = VARIANTS.get(kernel, ["swiglu"]) if hot else ["swiglu"]
                    yield from ((arch, kernel, config, hot, variant, dtype) for variant in variants)
                if "odd" in names and not hot_only:
                    for variant in ("swiglu odd", "quick_geglu bias odd"):
                        yield arch, kernel, config, False, variant, torch.bfloat16
        for kernel in [] if hot_only else small(arch):
            yield arch, kernel, None, False, "swiglu", torch.bfloat16


def record(
    arch: str, kernel: str, config: Config | None, hot: bool, variant: str, dtype: torch.dtype, spent: bool = True
) -> Iterator[dict[str, Any]]:
    """The record of a row: one for each kernel launched that has not been seen in another row; see `measure`."""
    with caught(arch) as found:
        (launches(kernel, variant, dtype, config) if config else small(arch)[kernel])()
    for fn, args, options in found:
        if config is None or fn.__name__ == f"{kernel}_kernel":
            name = kernel if config else fn.__name__.removesuffix("_kernel")
            measured = measure(compiled(fn, args, options, arch), spent and arch == "sm_90")
            if config and arch == "sm_90":
                measured["ctas"] = at_once(measured["registers"], measured["shared"], config.warps)
            yield dict(
                kernel=name,
                arch=arch,
                config=str(config or ""),
                hot=hot,
                variant=variant + (" fp32" if dtype == torch.float32 else ""),
                **measured,
            )


def measure(kernel: Any, spent: bool) -> dict[str, Any]:
    """What the machine code needs and has; on Hopper also what it is found to spend, by `sass.counts`."""
    asm = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    count = lambda pattern: len(re.findall(pattern, asm))
    registers, spills = _nvidia(kernel.asm["cubin"]) if "ptx" in kernel.asm else _amd(asm)
    return dict(
        registers=registers,
        spills=spills,
        shared=kernel.metadata.shared,
        mma=count(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"),
        wgmma=count(r"wgmma\.mma_async"),
        tma_load=count(r"cp\.async\.bulk\.tensor\S*\.shared::\w+\.global"),
        tma_store=count(r"cp\.async\.bulk\.tensor\S*\.global\.shared::"),
        async_wait=count(r"(?:wgmma|cp\.async)\.wait_group\S*\s+[1-9]"),
        **(counts(kernel.asm["cubin"]) if spent else {}),
    )


def _nvidia(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (re.search(rf"{key}:(\d+)", found.stdout) for key in ("REG", "STACK"))
    assert registers and stack, found.stdout
    return int(registers[1]), int(stack[1])  # these kernels have no arrays: a stack frame is spilled registers


def _amd(asm: str) -> tuple[int, int]:
    numbers = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", asm)}
    return numbers["vgpr_count"], 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])


def lines(rows: list[dict[str, Any]]) -> str:
    """JSON, a row on a line."""
    return "[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--hot", action="store_true", help="only tiles of large shapes")
    parser.add_argument("--brief", action="store_true", help="few kernels on Hopper: what the tests compile")
    parser.add_argument("--fits", action="store_true", help="what code needs and has, not what it spends")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="records instead of a table")
    options = parser.parse_args()
    chosen = brief() if options.brief else rows(options.arch or list(TARGETS), options.hot)
    found = [r | {"triton": triton.__version__} for row in chosen for r in record(*row, not options.fits)]
    if options.json:
        print(lines(found), end="") if options.json == "-" else Path(options.json).write_text(lines(found))
        return
    cells = [FIELDS] + [[str(r.get(f, "-")) for f in FIELDS] for r in found]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    if bad := [r for r in found if r["shared"] > SHARED[r["arch"]]]:
        sys.exit(f"more shared memory than the device has: {bad}")


if __name__ == "__main__":
    main()
