"""The laws of an adapter's other methods, which a class of yours may have its own of: they are `to_hf` in parts."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fmoe.layout.adapter import Adapter
from fmoe.testing.apart import assert_apart
from fmoe.testing.compared import assert_listed, same
from fmoe.testing.pairs import assert_same_order
from fmoe.types import AdapterError


def assert_yields(what: str, pairs: Iterable[tuple[str, Any]], expected: Mapping[str, Any]) -> None:
    """The pairs are the items of expected, in its order, each once."""
    listed = list(pairs)
    names = [name for name, _ in listed]
    assert len(set(names)) == len(names), f"{what} yields {max(names, key=names.count)!r} twice"
    same(dict(listed), expected, what)
    assert_listed(what, names, list(expected))


def assert_singles(law: str, adapter: Adapter, native: Mapping[str, Tensor], **ranges: Any) -> None:
    """What `convert_single_tensor_to_hf` gives of a native tensor is what `to_hf` does of it alone."""
    for name, one in _alone(adapter, native, ranges):
        what = f"{law}: convert_single_tensor_to_hf({name!r}{''.join(f', {a}={r}' for a, r in ranges.items())})"
        assert_yields(what, adapter.convert_single_tensor_to_hf(name, native[name], **ranges), one)


def assert_alone(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """The HF tensors that one native tensor makes are the same where it is converted alone."""
    made = {sources[0]: targets for sources, targets in adapter.inverse.plan(native).units() if len(sources) == 1}
    for name, one in _alone(adapter, {n: native[n] for n in made}, {}):
        same(one, {n: hf[n] for n in made[name]}, f"single: to_hf of {name!r} alone")


def _alone(
    adapter: Adapter, native: Mapping[str, Tensor], ranges: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """What to_hf gives of each native tensor that can be converted without others, as one factor of two cannot."""
    for name, tensor in native.items():
        try:
            yield name, adapter.to_hf({name: tensor}, **ranges)
        except AdapterError:
            continue


def assert_methods(adapter: Adapter, hf: Mapping[str, Tensor], native: Mapping[str, Tensor]) -> None:
    """Of a class of yours also: what its methods return is settled by names and values, here and in other processes."""
    back = adapter.to_hf(native)
    assert_same_order("from_hf of x", adapter.from_hf, hf, native)
    assert_same_order("to_hf of from_hf(x)", adapter.to_hf, native, back)
    dense = adapter.iter_hf(native, contiguous=True, detach=True)
    assert_yields("inverse: iter_hf(from_hf(x), contiguous=True, detach=True)", dense, back)
    assert_apart("to_hf", adapter.to_hf, native, back)
    assert_apart("iter_hf", partial(_iterated, adapter), native, back)
    assert_apart("from_hf", adapter.from_hf, hf, native)


def _iterated(adapter: Adapter, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(adapter.iter_hf(native))
