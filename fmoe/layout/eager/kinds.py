"""Tensors that cannot be moved: of a kind that has not what a rule does, or quantised by torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, bits

QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
"""Of tensors with scales of their own, which stacking makes anew from the first one's."""
PLAIN = (Tensor, torch.nn.Parameter)
FIX = "expected tensors of numbers. Fix: dequantise them first, as `dequantize()` of most kinds does"


@contextmanager
def movable(given: Mapping[str, Any]) -> Iterator[None]:
    """Raises AdapterError naming what is of no plain kind where torch says that it has no such operation for a kind.

    Only those are tensors of another kind that fail: DTensors, Parameters and whatever else has the operation pass.
    """
    try:
        yield
    except (NotImplementedError, TypeError) as fault:
        odd = tuple(n for n, t in given.items() if type(t) not in PLAIN)
        if isinstance(fault, TypeError) and not odd:
            raise
        names, why = odd or tuple(given), (str(fault).splitlines() or [""])[0]
        kinds = sorted({type(given[n]).__name__ for n in names})
        raise AdapterError(
            [Problem(f"{some(names)}: {', '.join(kinds)} cannot be moved ({why[:200]}), {FIX}", names)]
        ) from fault


def unwritable(tensor: Tensor) -> str:
    """Why the bytes of a tensor cannot be written; empty where they can.

    >>> unwritable(torch.ones(2)), unwritable(torch.ones(2, dtype=torch.complex64).conj())
    ('', 'is a conjugate view, expected a tensor whose bytes are its values. Fix: resolve_conj() of it')
    """
    if tensor.is_conj() or tensor.is_neg():
        kind, fix = ("conjugate", "resolve_conj") if tensor.is_conj() else ("negative", "resolve_neg")
        return f"is a {kind} view, expected a tensor whose bytes are its values. Fix: {fix}() of it"
    if type(tensor) in PLAIN:
        return ""
    try:
        bits(tensor[(0,) * tensor.ndim].cpu()).tolist() if tensor.numel() else None
    except (RuntimeError, TypeError, AssertionError) as fault:
        return (
            f"is a {type(tensor).__name__}, of which no bytes can be read ({str(fault).splitlines()[0][:200]}), {FIX}"
        )
    return ""
