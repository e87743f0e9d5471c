"""Which tiles: a table by architecture, kernel and shape, shipped as configs.json or written by `tune`.

Nothing is ever tuned at run time, so that runs repeat, ranks agree and graphs capture. Where an architecture has no
table of its own, the nearest older one of its vendor serves.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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


KERNELS = ("up", "gmm", "dact", "dw")
"""What an expert layer launches: every architecture of a table has tiles for these."""


@lru_cache
def load(path: str = "") -> Table:
    """The table at path (empty: the shipped one), {arch: {kernel: {bucket: Config}}}.

    Raises ValueError, naming the table, for what is none.
    """
    try:
        raw = json.loads((Path(path) if path else SHIPPED).read_text())
    except (OSError, ValueError, RecursionError) as error:  # no file, not text, no JSON
        raise ValueError(_told(path, f"cannot be read: {error}")) from None
    table: Table = {}
    for arch, kernels in _named(raw, path, "the table").items():
        if not ARCHITECTURE.fullmatch(arch):
            raise ValueError(_told(path, f"has {arch!r}, expected cpu, sm_90, gfx942, .."))
        for kernel, buckets in _named(kernels, path, arch).items():
            tiles = _named(buckets, path, f"{kernel!r} of {arch}").items()
            found = {b: _config(c, path, f"{b!r} of {kernel!r} of {arch}") for b, c in tiles}
            table.setdefault(arch, {})[kernel] = found
        if lost := [k for k in KERNELS if "large" not in kernels.get(k, {})]:
            raise ValueError(_told(path, f"has no tiles 'large' of {lost[0]!r} for {arch}, expected {list(KERNELS)}"))
    return table


ARCHITECTURE = re.compile(r"cpu|sm_\d{1,4}|gfx[0-9a-f]{1,8}", re.ASCII)


def _named(part: Any, path: str, what: str) -> dict[str, Any]:
    if not isinstance(part, dict) or not part:
        raise ValueError(_told(path, f"has {part!r:.60} as {what}, expected an object of names, not empty"))
    return part


def _config(fields: Any, path: str, what: str) -> Config:
    defaults, found = Config._field_defaults, _named(fields, path, what)
    if odd := [*(found.keys() - set(Config._fields)), *(set(Config._fields) - defaults.keys() - found.keys())]:
        raise ValueError(
            _told(path, f"has {list(found)} as {what}, which differs in {min(odd)!r} from {Config._fields}")
        )
    for name, n in found.items():
        if problem := field_problem(name, n):
            raise ValueError(_told(path, f"has {name} = {n!r:.60} in {what}, expected {problem}"))
    return Config(**found)


def field_problem(name: str, n: Any) -> str:
    """What a field of a Config should be, where n is not: sizes are powers of two, counts are 1 or more, flags bools.

    >>> field_problem("rows", 17), field_problem("rows", 16), field_problem("tma", 1)
    ('a power of two', '', 'True or False')
    """
    if isinstance(Config._field_defaults.get(name), bool):
        return "" if isinstance(n, bool) else "True or False"
    if type(n) is not int or not 1 <= n < 2**16:
        return "an integer from 1 on"
    return "a power of two" if name not in ("stages", "group", "ctas") and n & (n - 1) else ""


def _told(path: str, what: str) -> str:
    return f"fmoe_kernels: table {path!r} {what}. Fix: let fmoe_kernels.tune write one"


@lru_cache
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ..; cpu for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    found = torch.cuda.get_device_properties(device)
    return found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


def nearest(arch: str, table: Table, path: str = "") -> str:
    """The name in the table at path that serves arch. Raises ValueError where none does.

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
        whose = f"fmoe_kernels: table {path!r} has " * bool(path)
        told = f"{whose}no tiles for {arch}: the table has {', '.join(table)}; write one with fmoe_kernels.tune"
        raise ValueError(told)
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
    buckets = table[nearest(architecture(device), table, path)][kernel]
    return buckets.get(bucket(dtype, rows, n_experts, depth, batch_invariant, aligned)) or buckets["large"]
