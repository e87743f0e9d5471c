"""Compiles on a CPU what `gpu.sh` will launch on an H200, into a cache that is carried there.

    python bench/gpu/precompile.py [STEP ..]    # with the Python and the triton of the device, the same to the byte

Each step is run on tensors without data, as it is there. Files of the cache hold absolute paths, so it is used at one
path, FMOE_CACHE (/tmp/fmoe-triton-cache), which both sides link to build/triton-cache in this project. A second run
compiles nothing: so it tells whether a cache that was carried serves.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("FMOE_CACHE", "/tmp/fmoe-triton-cache"))


def link() -> Path:
    """Makes build/triton-cache, and CACHE a link to it."""
    (kept := ROOT / "build" / "triton-cache").mkdir(parents=True, exist_ok=True)
    CACHE.unlink(missing_ok=True)
    CACHE.symlink_to(kept)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    return kept


Call = Callable[[], object]


def layers(shapes: dict[str, Any]) -> dict[str, Call]:
    """Ours, as `layers.py` and `waits.py` call it: an inference forward, training, and training that keeps less."""
    import torch
    from common import layer, leaves, trained
    from layers import LAYERS

    def one(s: Any) -> None:
        with torch.no_grad():
            LAYERS["ours"](s)(*layer(s))
        for name in ("ours", "ours, recompute"):
            inputs = leaves(layer(s))
            y = LAYERS[name](s)(*inputs)
            torch.autograd.grad(y, trained(inputs), torch.empty_like(y))

    return {name: partial(one, s) for name, s in shapes.items()}


def correct() -> dict[str, Call]:
    """What `correct.py` is about: bf16 and swiglu."""
    import fmoe_kernels
    import torch
    from correct import WIDTHS, run

    given = lambda sizes: partial(run, fmoe_kernels.experts, torch.bfloat16, "swiglu", sizes, False)
    return {f"correct, {name}": given(sizes) for name, sizes in WIDTHS.items()}


def products(shapes: dict[str, Any]) -> dict[str, Call]:
    """Those of `fp8_layers.py`."""
    import fmoe_kernels
    from fmoe_kernels.programs import fp8
    from fp8_layers import operands, sizes

    def one(s: Any) -> None:
        for depth, width in sizes(s).values():
            rows, w, q, scale, ends = operands(s, depth, width)
            fmoe_kernels.products.gmm(rows, w, ends), fp8.gmm(rows, q, scale, ends)

    return {f"fp8, {name}": partial(one, s) for name, s in shapes.items()}


def twins(shapes: dict[str, Any]) -> dict[str, Call]:
    """Both of each pair in `specialised.py`."""
    from specialised import TILES, calls

    both = lambda s: [call(TILES[k]._replace(specialised=f)) for k, call in calls(s).items() for f in (True, False)]
    return {f"specialised, {name}": partial(both, s) for name, s in shapes.items()}


def sweep(s: Any) -> dict[str, Call]:
    """The tiles that `tune` tries."""
    import torch
    from fmoe_kernels.tools.tuning import _calls, candidates

    def tiles(kernel: str, call: Callable[[Any], object]) -> None:
        for c in candidates(kernel, tma=True):
            with suppress(Exception):  # what cannot be launched is left out, as there
                call(c)

    calls = _calls(*s, "swiglu", torch.bfloat16, torch.device("meta"))
    return {f"sweep of {kernel}": partial(tiles, kernel, call) for kernel, call in calls.items()}


def calls() -> dict[str, Callable[[], dict[str, Call]]]:
    """step -> its launches by name, most valuable first."""
    from common import DECODE, MAIN, SHAPES
    from races import SMALL

    few = {name: SHAPES[name] for name in MAIN}
    return {
        "layers": lambda: layers(few),
        "correct": correct,
        "decode": lambda: layers(DECODE),
        "others": lambda: layers({name: s for name, s in SHAPES.items() if name not in few}),
        "sweep": lambda: sweep(SHAPES[MAIN[0]]),
        "fp8": lambda: products(few),
        "specialised": lambda: twins(few),
        "races": lambda: layers({"races": SMALL}),
    }


class Built(Exception):
    """A module is in the cache; it is not loaded, since it needs a driver."""


def starters(kernels: Iterable[Any]) -> int:
    """Builds what starts these kernels, a C module for each signature, into the cache: the device needs no compiler.

    They are linked to a libcuda with nothing in it. Only the Python that builds them can load them. Versions after
    triton 3.6 have one for all, whose place in a cache depends on where libcuda is: it is built there.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "make_launcher"):
        return 0
    stub = ROOT / "build" / "libcuda"
    stub.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cc", "-shared", "-o", stub / "libcuda.so.1", "-x", "c", "/dev/null"], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub)
    paths = set()

    def load(name: str, path: str) -> None:
        paths.add(path)
        raise Built

    build._load_module_from_path = load
    for make in (driver.CudaUtils, *(lambda k=k: driver.CudaLauncher(k.src, k.metadata) for k in kernels)):
        with suppress(Built):
            make()
    return len(paths)


def prune(folder: Path) -> None:
    """Leaves of each kernel what a launch reads: machine code and what is said of it."""
    for group in folder.rglob("__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        kept = {name: path for name, path in paths.items() if name.endswith((".cubin", ".json"))}
        for name in paths.keys() - kept.keys():
            (group.parent / name).unlink(missing_ok=True)
        group.write_text(json.dumps({"child_paths": kept}))


def main(steps: Iterable[str]) -> None:
    kept = link()
    sys.path.insert(0, str(ROOT / "bench"))
    import common
    import triton
    from fake_gpu import fake_gpu

    common.DEVICE, began, every, made = "meta", time.perf_counter(), {}, list[str]()
    note = lambda src, cache_hit, **_: None if cache_hit else made.append(src.name)
    triton.knobs.compilation.listener = note
    for step in steps or calls():
        with fake_gpu() as seen:
            for name, call in calls()[step]().items():
                call()
                every |= {(kernel, key): it for kernel, key, it in seen}
                print(f"{step} {name}: {len(every)} kernels, {time.perf_counter() - began:.0f} s", flush=True)
    started = starters(every.values())
    prune(kept)
    size = sum(f.stat().st_size for f in kept.rglob("*") if f.is_file()) / 2**20
    print(
        f"{len(every)} kernels, {len(made)} compiled now; {started} modules that start them; {size:.0f} MiB in {kept}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
