"""Which tiles: a table by architecture, kernel and shape, shipped as configs.json or written by `tune`.

Nothing is ever tuned at run time, so that runs repeat, ranks agree and graphs capture. Where an architecture has no
table of its own, the nearest older one of its vendor serves.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

SHIPPED = Path(__file__).with_name("configs.json")

Table = dict[str, dict[str, dict[str, "Config"]]]


class Config(NamedTuple):
    """A tile of rows x columns, steps of `depth`; `swap` multiplies transposed, `parts` cuts the epilogue by columns.

    tma: move through descriptors where strides allow. group: row tiles that visit one column block together.
    ctas: programs for each multiprocessor. flatten: tiles and steps are one loop, for short sums; only `gmm`
    takes it (in `up` the compiler would wait for every product). specialised: `gmm` and
    `up` by warps of two kinds, on sm_90 alone, and never run yet: see `programs.specialised`.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    group: int = 8
    ctas: int = 1
    swap: bool = False
    tma: bool = False
    flatten: bool = False
    specialised: bool = False

    def __str__(self) -> str:
        flags = "".join(f" {name}" for name in ("swap", "tma", "flatten", "specialised") if getattr(self, name))
        return f"{self.rows}x{self.columns}x{self.depth} w{self.warps} s{self.stages} p{self.parts}{flags}"


@lru_cache
def load(path: str = "") -> Table:
    """The table at path (empty: the shipped one), {arch: {kernel: {bucket: Config}}}."""
    raw = json.loads((Path(path) if path else SHIPPED).read_text())
    return {
        arch: {kernel: {b: Config(**c) for b, c in buckets.items()} for kernel, buckets in kernels.items()}
        for arch, kernels in raw.items()
    }


@lru_cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ..; cpu for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    found = torch.cuda.get_device_properties(device)
    return found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


def nearest(arch: str, table: Table) -> str:
    """The name in the table that serves arch. Raises ValueError where none does.

    >>> table = {"sm_80": {}, "sm_90": {}, "gfx942": {}}
    >>> nearest("sm_89", table), nearest("sm_90", table), nearest("gfx950", table)
    ('sm_80', 'sm_90', 'gfx942')
    """
    if arch in table:
        return arch
    kind = arch.rstrip("0123456789abcdef") if arch.startswith("gfx") else arch.split("_")[0]
    # descriptors and tile shapes of data-centre Blackwell do not fit consumer Blackwell
    older = [a for a in table if a.startswith(kind) and _number(a) <= _number(arch)]
    if not older:
        raise ValueError(f"no tiles for {arch}: the table has {', '.join(table)}; write one with fmoe_kernels.tune")
    return "sm_80" if arch.startswith("sm_12") and "sm_80" in older else max(older, key=_number)


def _number(arch: str) -> int:
    return int(arch.removeprefix("gfx"), 16) if arch.startswith("gfx") else int(arch.removeprefix("sm_"))


def bucket(
    dtype: torch.dtype, rows: int, n_experts: int, depth: int, batch_invariant: bool, aligned: bool = True
) -> str:
    """The shape class: by dtype, alignment, (unless batch_invariant) rows for each expert, and the product's depth.

    aligned: do all rows start at multiples of 16 bytes? What moves element by element takes registers for addresses,
    and so smaller tiles.

    >>> bucket(torch.bfloat16, 64, 128, 2048, False), bucket(torch.bfloat16, 64, 128, 2048, True)
    ('decode', 'large')
    >>> bucket(torch.bfloat16, 64, 128, 1001, True, aligned=False)
    'odd'
    """
    if dtype == torch.float32:
        return "fp32"
    if not aligned:
        return "odd"
    if not batch_invariant and rows <= 32 * n_experts:
        return "decode"
    if not batch_invariant and rows <= 192 * n_experts:
        return "small"
    return "narrow" if depth <= 768 else "large"


def pick(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, n_experts: int, depth: int,
    batch_invariant: bool = False, path: str = "", aligned: bool = True,
) -> Config:  # fmt: skip
    """The tiles of a kernel for this shape on this device; a kernel without a class of its own takes `large`."""
    table = load(path)
    buckets = table[nearest(architecture(device), table)][kernel]
    return buckets.get(bucket(dtype, rows, n_experts, depth, batch_invariant, aligned)) or buckets["large"]
