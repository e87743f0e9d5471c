"""Names and shapes of a layer's parameters, checked before anything is multiplied."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fmoe.types import Params


def check_params(
    owner: str,
    params: Params,
    axes: Mapping[str, str],
    sizes: Mapping[str, int],
    *,
    optional: Collection[str] = (),
    coded: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """params has every name of `axes` that is not optional, no other name, and each the shape that its letters say.

    The `_scale_inv` that a decoded FP8 parameter carries along is passed over; an 8-bit one, not decoded, is refused
    unless `coded` has its name with its dtype.
    axes maps a name to the letters of its axes, such as "E D U" or "1 D"; sizes maps each letter to a number.
    Raises ValueError with one line for each problem: what was found, what was expected.

    >>> import torch
    >>> check_params("experts", {"down_projs": torch.ones(2, 5, 3)}, {"down_projs": "E I D"}, dict(E=2, I=4, D=3))
    Traceback (most recent call last):
    ValueError: experts: parameter 'down_projs' has shape [2, 5, 3], expected [E=2, I=4, D=3]
    """

    known = {*axes, *(name + "_scale_inv" for name in axes)}
    unknown = [f"unknown parameter {name!r}, expected only {', '.join(axes)}" for name in params if name not in known]
    undecoded = [
        f"parameter {name!r} is {tensor.dtype}, expected it decoded: `from_hf` does, with its scales"
        for name, tensor in params.items()
        if name in axes and (tensor.dtype.itemsize < 2 or not tensor.is_floating_point())
        if coded.get(name) != tensor.dtype
    ]
    missing = [
        f"parameter {name!r} is missing, expected shape {_say(letters, sizes)}"
        for name, letters in axes.items()
        if name not in params and name not in optional
    ]
    wrong = [
        f"parameter {name!r} has shape {list(params[name].shape)}, expected {_say(letters, sizes)}"
        for name, letters in axes.items()
        if name in params and list(params[name].shape) != _shape(letters, sizes)
    ]
    if problems := unknown + missing + wrong + undecoded:
        raise ValueError("\n".join(f"{owner}: {problem}" for problem in problems))


def in_shape(y: Tensor, shape: Sequence[int]) -> Tensor:
    """y, which nothing else holds, in another shape: no copy, and to autograd no view, so that it may be added to.

    An in-place operation on a view rewrites the history of its base, and drops the hook that FSDP2 has put on the view.

    >>> in_shape(torch.ones(2, 3, requires_grad=True) * 2, (3, 2))._is_view()
    False
    """
    return y if y.shape == torch.Size(shape) else torch.ops.aten._unsafe_view(y.contiguous(), shape)


def _shape(letters: str, sizes: Mapping[str, int]) -> list[int]:
    return [int(letter) if letter.isdigit() else sizes[letter] for letter in letters.split()]


def _say(letters: str, sizes: Mapping[str, int]) -> str:
    return "[" + ", ".join(a if a.isdigit() else f"{a}={sizes[a]}" for a in letters.split()) + "]"
