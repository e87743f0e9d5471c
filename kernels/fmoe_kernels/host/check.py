"""What kernels are given: shapes, dtypes and devices, checked on the host before anything is launched.

A kernel reads memory by the sizes it is told, so a tensor that does not fit is an error here and nowhere else. What is
in a tensor only the device knows: there kernels clamp (`programs.route.sorted_route`) or drop (`make_route`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDE = (*FLOATS, torch.float64)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
BOOL = (torch.bool,)
LONG = (torch.int64,)
ENDS = (torch.int32, torch.int64)
MOST_ROWS = 2**30 - 1
"""Rows and slots are int32, and a tile of rows ends at 2^30: see `host.launch.rows_descriptor`."""

GATED = {name: True for name in "swiglu swiglu_clamped swiglu_oai quick_geglu geglu situ".split()} | {"relu2": False}
"""Activations by name: does it take gate and up columns, U = 2I?"""
PLAIN = (Tensor, torch.nn.Parameter)
Dtypes = tuple[torch.dtype, ...]


def check(who: str, given: Mapping[str, tuple[Any, str, Dtypes]], **sizes: int) -> dict[str, int]:
    """The size of each axis letter, if every tensor fits: {name: (tensor, axes, dtypes)}, letters as first seen.

    A letter that `sizes` has is known beforehand. Raises ValueError, naming who and the tensor, for what is no dense
    tensor, has another dtype or device than expected, or sizes that contradict those before it.

    >>> check("gmm", {"x": (torch.ones(4, 5), "N K", FLOATS), "w": (torch.ones(2, 5, 3), "E K M", FLOATS)})
    {'N': 4, 'K': 5, 'E': 2, 'M': 3}
    >>> check("gmm", {"x": (torch.ones(4, 5), "N K", FLOATS), "w": (torch.ones(2, 9, 3), "E K M", FLOATS)})
    Traceback (most recent call last):
        ...
    ValueError: gmm: w is [2, 9, 3], expected [E K M] = [E, 5, M]
    """
    first = next(iter(given))
    for name, (tensor, axes, dtypes) in given.items():
        check_kind(who, name, tensor, axes, dtypes)
        letters = axes.split()
        expected = [sizes.get(letter, letter) for letter in letters]
        pairs = zip(tensor.shape, expected, strict=False)
        if tensor.ndim != len(letters) or not all(
            isinstance(size, str) or bool(found == size) for found, size in pairs
        ):
            told = ", ".join(map(str, expected))
            raise ValueError(f"{who}: {name} is {list(tensor.shape)}, expected [{axes}] = [{told}]")
        sizes = sizes | dict(zip(letters, tensor.shape, strict=True)) | sizes  # known ones stay, and stay first
        check_device(who, name, tensor, first, given[first][0])
    return sizes


def check_kind(who: str, name: str, tensor: Any, axes: str, dtypes: Dtypes) -> None:
    """Raises ValueError for what is no dense tensor with numbers of its own, or of another dtype."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        found = f"of type {type(tensor).__name__}"
        if isinstance(tensor, Tensor):
            found = "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{who}: {name} is {found}, expected a dense tensor [{axes}]")
    if type(tensor) not in PLAIN and answers(type(tensor)):
        fix = "DTensor, expected this rank's part of it. Fix: .to_local()"
        if type(tensor).__name__ != "DTensor":
            fix = f"{type(tensor).__module__}.{type(tensor).__qualname__}, expected a plain tensor, of these numbers"
        raise ValueError(f"{who}: {name} is a {fix}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{who}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {say(dtypes)} [{axes}]")


def answers(kind: type, torchs: bool = False) -> bool:
    """Is it a class of tensors that answers operators itself, so that its numbers are not those of its storage?

    Those of PyTorch alone, such as a fake tensor, only where asked for; DTensor always, which no operator here answers.

    >>> answers(torch.nn.Parameter), answers(torch.distributed.tensor.DTensor)
    (False, True)
    """
    own = [c for c in kind.__mro__ if not issubclass(Tensor, c) and "__torch_dispatch__" in vars(c)]
    return any(torchs or c.__name__ == "DTensor" or not c.__module__.startswith("torch.") for c in own)


def check_device(who: str, name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    """Raises ValueError where a tensor is not where the first is."""
    if tensor.device != like.device:
        raise ValueError(f"{who}: {name} is on {tensor.device}, expected {like.device}, where {first} is")


def check_numbers(who: str, **numbers: Any) -> None:
    """Raises ValueError for what is no number, NaN included.

    >>> check_numbers("swiglu", limit=7, alpha=1.0)
    """
    for name, n in numbers.items():
        large = isinstance(n, int) and abs(n) >= 2**1000
        if isinstance(n, bool) or large or not isinstance(n, int | float | torch.SymFloat) or n != n:
            raise ValueError(f"{who}: {name} is {n!r}, expected a number")


def check_flags(who: str, **flags: Any) -> None:
    """Raises ValueError for what is neither True nor False.

    >>> check_flags("experts", wide="no")
    Traceback (most recent call last):
        ...
    ValueError: experts: wide is 'no', expected True or False
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{who}: {name} is {flag!r}, expected True or False")


def check_index(who: str, name: str, n: Any, least: int, what: str) -> None:
    """Raises ValueError for what is no integer from least on that kernels can count to.

    >>> check_index("experts", "start", 1.5, 0, "the id of the first expert here")
    Traceback (most recent call last):
        ...
    ValueError: experts: start is 1.5, expected 0 or more: the id of the first expert here
    """
    if isinstance(n, bool) or not isinstance(n, int) or not least <= n < 2**62:
        raise ValueError(f"{who}: {name} is {n!r}, expected {least} or more: {what}")


def check_activation(who: str, activation: Any) -> None:
    """Raises ValueError for what is no activation's name."""
    if not isinstance(activation, str) or activation not in GATED:
        raise ValueError(f"{who}: activation is {activation!r}, expected one of {', '.join(GATED)}")


def check_same(who: str, like: str, x: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError where a tensor's dtype is not that of x."""
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{who}: {name} is {tensor.dtype}, expected {x.dtype}, as {like}")


def check_layer(
    who: str, x: Any, indices: Any, weights: Any, mask: Any, w_up: Any, w_down: Any, b_up: Any, b_down: Any,
    activation: Any, start: Any,
) -> None:  # fmt: skip
    """Raises ValueError for what is no expert layer, its input and routing."""
    check_activation(who, activation)
    check_index(who, "start", start, 0, "the id of the first expert here")
    given: dict[str, tuple[Any, str, Dtypes]]
    given = {"x": (x, "T D", WIDE), "indices": (indices, "T K", INTEGERS), "weights": (weights, "T K", WIDE)}
    given |= {"mask": (mask, "T", BOOL)} if mask is not None else {}
    sizes = check(who, given | {"w_down": (w_down, "E I D", WIDE)})
    sizes["U"] = 2 * sizes["I"] if GATED[activation] else sizes["I"]
    biases = {"b_up": (b_up, "E U", WIDE), "b_down": (b_down, "E D", WIDE)}
    params = {"w_up": (w_up, "E D U", WIDE)} | {name: b for name, b in biases.items() if b[0] is not None}
    check(who, {"x": given["x"], **params}, **sizes)
    if 0 in (sizes["E"], sizes["D"], sizes["I"]):
        raise ValueError(f"{who}: w_down is {list(w_down.shape)}, expected [E I D] without a zero")


def say(dtypes: Dtypes) -> str:
    """The dtypes as a phrase.

    >>> say(FLOATS)
    'float16, bfloat16 or float32'
    """
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


def few_enough(who: str, name: str, rows: int) -> None:
    """Raises ValueError for more rows than kernels count."""
    if rows > MOST_ROWS:
        raise ValueError(f"{who}: {name} has {rows} rows, expected at most {MOST_ROWS}. Fix: call it for parts of them")
