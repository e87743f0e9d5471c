"""What compilers make of the product that decodes its tiles (`gmm_codes`), on GPUs that are not here: as `aot.py`.

    cd bench && python -m layer.codes_kernel [--arch sm_90] [--kind mxfp4] [--json FILE]

Every format, forward and turned (the gradient of rows), with the tiles that the table of `gmm` gives it. Turned: by the
transposed matrices, whose packed axis is that of the columns.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aot
import torch
import triton
from fake_gpu import caught, compiled
from fmoe_kernels.host import configs
from fmoe_kernels.host.launch import Tiling
from fmoe_kernels.programs import codes, route

KINDS = ("mxfp4", "nvfp4", "int4", "fp8", "int8", "signed", "points", "late")
CLASSES = ("large", "narrow", "small", "decode")
SHOWN = ("kind", "turned", "class", "tiles", "registers", "spills", "shared", "mma", "wgmma", "tma_load", "async_wait")


def new(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def coded(kind: str, turned: bool) -> codes.Coded:
    E, U, D = aot.E, 2 * aot.INNER, aot.WIDTH
    packed = {"int4": 8, "points": 8, "int8": 4, "fp8": 1, "signed": 1}.get(kind, 2)
    words = new(E, U, D // packed, dtype=torch.int32 if packed > 2 else torch.uint8)
    scale, second, block = new(E, U, D // 32), None, (32, 1)
    if kind in ("nvfp4", "late"):
        scale, second, block = new(E, U, D // 16), new(E, 1, U, dtype=torch.float32), (16, 1)
    elif kind == "signed":
        scale, block = new(E, U, 1, dtype=torch.bfloat16), (0, 1)
    elif packed > 2:
        scale = new(E, U, D // 32, dtype=torch.bfloat16)
        second = new(E, U, D // 32).mT if kind == "points" else None
    elif kind == "fp8":
        scale, block = new(E, U // 128, D // 128, dtype=torch.float32), (128, 128)
    code = {"points": "int4", "fp8": "e4m3"}.get(kind, kind if kind in ("int4", "int8", "signed") else "e2m1")
    return codes.Coded(words.mT, scale.mT, second, code, block, late=kind == "late", turned=turned)


def records(arch: str, kinds: tuple[str, ...] = KINDS, classes: tuple[str, ...] = CLASSES) -> Iterator[dict[str, Any]]:
    N, table = aot.T * aot.K, configs.load()[arch]["gmm"]
    r = route.Route(*(new(n, dtype=torch.int32) for n in (N, N, N, aot.E + 1)), aot.K)
    for kind in kinds:
        for turned in (False, True):
            rows = new(N, 2 * aot.INNER if turned else aot.WIDTH, dtype=torch.bfloat16)
            for name in (c for c in classes if c in table):
                with caught(arch) as found:
                    codes.gmm(rows, coded(kind, turned), r, Tiling(only=table[name]))
                (launch,) = [given for given in found if given[0].__name__ == "gmm_codes_kernel"]
                row = dict(kind=kind, turned=turned, arch=arch, tiles=str(codes.tiles_of(table[name])))
                measured = aot.measure(compiled(*launch, arch), arch)
                yield row | {"class": name} | measured | {"triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", choices=list(aot.TARGETS))
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--only", nargs="+", default=CLASSES, choices=CLASSES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = list(records(options.arch, tuple(options.kind), tuple(options.only)))
    for row in found:
        print(*(row[name] for name in SHOWN), sep="  ")
    if options.json:
        options.json.write_text(aot.lines(found))


if __name__ == "__main__":
    main()
