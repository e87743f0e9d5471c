"""Matrices that are codes: what words and scales may be, checked on the host."""

from collections.abc import Mapping
from typing import Any

import torch

from fmoe_kernels.host.check import FLOATS, Dtypes, check, check_flags

POINTED = {"int4": torch.int32, "int8": torch.int32, "signed": torch.uint8}
KINDS = {"e4m3": torch.uint8, "e2m1": torch.uint8} | POINTED
"""What words of each code are; those of integers may have zero points."""
PACKED = {"e4m3": 1, "signed": 1, "e2m1": 2, "int8": 4, "int4": 8}
"""How many codes a word of each holds."""


def check_code(who: str, code: Any, block: Any, second: Any, **flags: Any) -> None:
    """Raises ValueError for a code that there is none of, and blocks and flags that do not fit it.

    >>> check_code("decode", "e4m3", (3, 1), None)
    Traceback (most recent call last):
        ...
    ValueError: decode: block is (3, 1), expected powers of two, or 0
    """
    if not isinstance(code, str) or code not in KINDS:
        raise ValueError(f"{who}: code is {code!r}, expected one of {', '.join(KINDS)}")
    sides = block if isinstance(block, tuple) and len(block) == 2 else (None,)
    if not all(type(side) is int and side >= 0 and not side & (side - 1) for side in sides):
        raise ValueError(f"{who}: block is {block!r}, expected powers of two, or 0")
    check_flags(who, **flags)
    if second is not None and block[1] != 1 and code not in POINTED:
        raise ValueError(f"{who}: second stands beside blocks {block!r}, expected blocks of one column")


def check_scales(
    who: str, first: Mapping[str, tuple[Any, str, Dtypes]], scale: Any, second: Any, code: str,
    block: tuple[int, int], sizes: Mapping[str, int],
) -> None:  # fmt: skip
    """Raises ValueError for scales that do not fit matrices [E, K, M] of these sizes, on the device of the first."""
    grid = {a: -(-sizes[n] // (side or max(sizes[n], 1))) for a, n, side in zip("ab", "KM", block, strict=True)}
    points = code in POINTED and second is not None
    factors = FLOATS if points else (torch.uint8,) if second is not None else (torch.uint8, *FLOATS)
    beside = {**first, "scale": (scale, "E a b", factors)}
    if second is not None:
        beside["second"] = (second, "E a b", (torch.uint8,)) if points else (second, "E one M", (torch.float32,))
    check(who, beside, **{**sizes, **grid, "one": 1})
