"""What a conversion leaves in the page cache: bytes of its source and target that are held, and how dearly.

    python bench/cached/left.py --json bench/results/cached.json    # as root: it reads /proc/kpageflags

Counted page by page, so that neither load nor what others do matters. active: of the held bytes, those that the system
has put on its list of pages in use, because they were asked for more than once: only these push out what others use;
all else is the first to go when memory is asked for. Files are forgotten before each row.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

import synthetic
from pages import PAGE, forget, held

import fmoe

ACTIVE = 6  # the bit of /proc/kpageflags


def active(path: Path) -> int:
    """How many bytes of the file lie in memory on the active list; only what lies there is looked at."""
    size, libc = path.stat().st_size, ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    found = (ctypes.c_ubyte * -(-size // PAGE))()
    with (
        open(path, "rb") as file,
        open("/proc/self/pagemap", "rb", 0) as ours,
        open("/proc/kpageflags", "rb", 0) as all_,
    ):
        at = libc.mmap(None, ctypes.c_size_t(size), 1, 1, file.fileno(), ctypes.c_long(0))
        libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(size), 1)  # nothing is read ahead
        libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), found)
        count = 0
        for i in (i for i, page in enumerate(found) if page & 1):
            ctypes.c_ubyte.from_address(at + i * PAGE).value  # noqa: B018  (so that it is mapped)
            frame = int.from_bytes(os.pread(ours.fileno(), 8, (at // PAGE + i) * 8), sys.byteorder)
            flags = os.pread(all_.fileno(), 8, (frame & ((1 << 55) - 1)) * 8)
            count += int.from_bytes(flags, sys.byteorder) >> ACTIVE & 1
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    return count * PAGE


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def row(what: str, source: Path, dst: Path | None, work: Callable[[], Any]) -> dict[str, Any]:
    for path in (*weights(source), *(weights(dst) if dst and dst.exists() else ())):
        forget(path)
    if dst:
        shutil.rmtree(dst, ignore_errors=True)
    kept = work()
    told: dict[str, Any] = {"what": what, "bytes": sum(p.stat().st_size for p in weights(source))}
    for name, folder in (("source", source), ("target", dst)):
        files = weights(folder) if folder else []
        size = max(1, sum(p.stat().st_size for p in files))
        told |= {f"{name} held": _part(held, files, size), f"{name} active": _part(active, files, size)}
    del kept
    return told


def _part(count: Callable[[Path], int], files: Iterable[Path], size: int) -> float:
    return round(sum(map(count, files)) / size, 3)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--gigabytes", type=float, default=0.6)
    options.add_argument("--json", type=Path)
    how = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hf, native, fused, other = (Path(folder, n) for n in ("hf", "native", "fused", "other"))
        synthetic.CONFIGS["qwen3_moe"] |= {"hidden_size": 1024, "moe_intermediate_size": 384, "head_dim": 64}
        synthetic.write(hf, "qwen3_moe", how.gigabytes, 200_000_000)
        rows = [
            row("cp", hf, other, lambda: subprocess.run(["cp", "-r", hf, other], check=True)),
            row("to the other HF layout", hf, fused, lambda: fmoe.convert(hf, fused, "hf", layout="fused")),
            row("to native (transposes)", hf, native, lambda: fmoe.convert(hf, native)),
            row("from native back to HF (transposes)", native, other, lambda: fmoe.convert(native, other, "hf")),
            row("experts 1 of 8 to native", hf, other, lambda: fmoe.convert(hf, other, e=range(16))),
            row("fmoe.load", hf, None, lambda: fmoe.load(hf)),
            row("fmoe.verify", hf, None, lambda: fmoe.verify(hf)),
        ]
    for told in rows:
        print(told)
    if how.json:
        how.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
