"""Dicts of tensors drawn and compared bit for bit: what is other is said by name, after the law that asked."""

from collections.abc import Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor

from fmoe.types import AdapterError, TensorSpec, bits, brief


def tensors(specs: Mapping[str, TensorSpec], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these specs: normal values, as bits that any dtype can hold.

    >>> tensors({"w": TensorSpec((2, 3), torch.bfloat16)})["w"].shape
    torch.Size([2, 3])
    """
    if not -(2**63) <= (seed := index(seed)) < 2**64:
        raise AdapterError(f"testing.tensors: seed is {brief(seed)}, expected an int of 64 bits")
    made = torch.Generator().manual_seed(seed)
    return {n: torch.randn(spec.shape, generator=made).to(spec.dtype) for n, spec in specs.items()}


def odd_values(specs: Mapping[str, TensorSpec], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these specs that hold what normal values are not: -0.0, infinities, NaN of any payload.

    >>> sorted({str(x) for x in odd_values({"w": TensorSpec((99,), torch.float16)})["w"].tolist() if abs(x) != 1})
    ['-0.0', '-inf', '0.0', '5.960464477539063e-08', '65504.0', 'inf', 'nan']
    """
    made = torch.Generator().manual_seed(seed)
    return {n: _odd(spec, made) for n, spec in specs.items()}


def _odd(spec: TensorSpec, made: torch.Generator) -> Tensor:
    """Of whole numbers and bytes any bits; of wider floats those of a list, so that small tensors have them too."""
    n, dtype = spec.numel, spec.dtype
    if dtype == torch.bool:
        return torch.randint(0, 2, spec.shape, generator=made).bool()
    if dtype.is_complex:
        parts = TensorSpec((*spec.shape, 2), dtype.to_real())
        return torch.view_as_complex(_odd(parts, made))
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return torch.randint(0, 256, (n * dtype.itemsize,), generator=made).byte().view(dtype).view(spec.shape)
    info = torch.finfo(dtype)
    real = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, info.tiny * info.eps, info.max, 1.0, -1.0], dtype=dtype)
    words = real.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    quiet = round(1 / info.eps) // 2 + 5  # the first bit of the fraction, and a payload
    words = torch.cat([words, words[2:4] | quiet, words[2:4] | quiet + 1])
    return words[torch.randint(0, len(words), spec.shape, generator=made)].view(dtype)


def same(a: Mapping[str, Any], b: Mapping[str, Any], what: str = "the first") -> None:
    """Asserts equal names, and for each equal shape, dtype and bits: those of b are expected. what: what a is.

    >>> same({"w": torch.ones(2)}, {"w": torch.ones(2)})
    >>> same({"w": torch.ones(3, 2)}, {"w": torch.ones(2, 3)}, "inverse: to_hf(from_hf(x))")
    Traceback (most recent call last):
    AssertionError: inverse: to_hf(from_hf(x)) gives 'w' as [3, 2], expected [2, 3]
    """
    lost, more = sorted(b.keys() - a.keys()), sorted(a.keys() - b.keys())
    assert not lost and not more, f"{what} gives other names: without {lost[:8]}, with {more[:8]}"
    for name, x in a.items():
        y = b[name]
        assert tuple(x.shape) == tuple(y.shape), f"{what} gives {name!r} as {[*x.shape]}, expected {[*y.shape]}"
        assert x.dtype == y.dtype, f"{what} gives {name!r} in {x.dtype}, expected {y.dtype}"
        if isinstance(x, Tensor) and not (x.is_meta or y.is_meta):
            assert torch.equal(bits(x), bits(y)), f"{what} gives {name!r} with other values"


def assert_pure(who: str, given: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """The argument of a function has the names and the bits that it had before.

    >>> assert_pure("from_hf", {"w": torch.ones(2)}, {"w": torch.zeros(2)})
    Traceback (most recent call last):
    AssertionError: purity: from_hf changed its argument 'w'
    """
    for name in [*before, *given]:
        kept = name in given and name in before and given[name].shape == before[name].shape
        kept = kept and given[name].dtype == before[name].dtype
        assert kept and torch.equal(bits(given[name]), bits(before[name])), (
            f"purity: {who} changed its argument {name!r}"
        )


def assert_listed(what: str, found: list[str], expected: list[str]) -> None:
    """Equal names come in equal order.

    >>> assert_listed("order: from_hf of x in another order", ["b", "a"], ["a", "b"])
    Traceback (most recent call last):
    AssertionError: order: from_hf of x in another order returns its names in another order: found ['b', 'a'], ...
    """
    if found != expected:
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise AssertionError(
            f"{what} returns its names in another order: found {found[at : at + 4]}, expected {expected[at : at + 4]}"
            f" again. Fix: make them in an order of their own, as over sorted(names)"
        )


def clones(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in storage of their own."""
    return {n: t.clone() for n, t in found.items()}
