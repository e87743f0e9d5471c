"""The numbers that a letter takes: a size, a range or some, as they are given and as they are shown."""

from collections.abc import Collection, Iterable
from typing import Any

from fmoe.types import AdapterError, brief

Bound = range | tuple[int, ...]
_MOST = 10**9  # numbers in names have nine digits at most


def size(name: str, values: object) -> Bound:
    """The values that a letter takes, from a size or from what it may be."""
    if isinstance(values, int) and not isinstance(values, bool):
        if values < 0:
            raise AdapterError(f"{name} is bounded by {brief(values)}, expected a size or some numbers")
        values = range(values) if 0 <= values <= _MOST else (values,)
    if isinstance(values, range):
        ends = [values.start, values.stop - values.step]
    elif not isinstance(values, str | bytes) and (listed := as_list(values)) is not None:
        values = ends = listed
    else:
        raise AdapterError(f"{name} is bounded by {brief(values)}, expected a size or some numbers")
    if values and not all(isinstance(v, int) and not isinstance(v, bool) and -1 <= v < _MOST for v in ends):
        raise AdapterError(f"{name} is bounded by {brief(values)}, expected a size or numbers below {_MOST}")
    return _bound(values)


def as_list(values: object) -> list[Any] | None:
    """What can be iterated, as a list; None for anything else, as for a tensor without dimensions, or a nested one."""
    if not isinstance(values, Iterable) or getattr(values, "is_nested", False):
        return None
    return list(values) if getattr(values, "shape", True) != () else None


def _bound(values: range | list[int]) -> Bound:
    if isinstance(values, range):
        return values
    found = tuple(sorted(set(values)))
    return range(found[0], found[-1] + 1) if found and found[-1] - found[0] + 1 == len(found) else found


def where(bounds: tuple[tuple[str, Bound], ...], indices: Collection[str]) -> str:
    def show(name: str, values: Bound) -> str:
        if isinstance(values, range) and values.start == 0:
            return f"{name} {'<' if name in indices else '='} {values.stop}"
        return f"{name} in {values.start}..{values.stop - 1}" if isinstance(values, range) else f"{name} in {values}"

    return "   where " + ", ".join(show(n, v) for n, v in bounds) if bounds else ""
