"""The laws of two plain functions: inverse, order, purity, each a function of its argument alone."""

import random
from collections.abc import Mapping

from torch import Tensor

from fmoe.testing.apart import Function, assert_apart
from fmoe.testing.compared import assert_listed, assert_pure, clones, odd_values, same, tensors
from fmoe.types import TensorSpec


def assert_pair(from_hf: Function, to_hf: Function, specs: Mapping[str, TensorSpec], seed: int) -> None:
    """to_hf(from_hf(x)) == x bit for bit, whatever the order of a dict, and whatever was converted before."""
    there, back, x = _watched("from_hf", from_hf), _watched("to_hf", to_hf), tensors(specs, seed)
    before = clones(x)
    native = there(x)
    kept = clones(native)
    hf = back(native)
    same(hf, before, "inverse: to_hf(from_hf(x))")
    assert_same_order("from_hf of x", there, x, kept)
    assert_same_order("to_hf of from_hf(x)", back, kept, hf)
    same(there(hf), kept, "inverse: from_hf(to_hf(from_hf(x)))")
    assert_pure("from_hf or to_hf", x, before)
    assert_follows(there, back, x, odd_values(specs, seed))
    assert_apart("to_hf", to_hf, kept, hf)
    assert_apart("from_hf", from_hf, x, kept)


def assert_same_order(what: str, function: Function, given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """function(given) is `made`, name after name, in whatever order given has its names, and the next time too."""
    names = list(given)
    orders = [names[::-1], names, *(random.Random(n).sample(names, len(names)) for n in range(3))]
    for order in orders:
        found = function({n: given[n] for n in order})
        again = f"order: {what} {'again' if order == names else 'in another order'}"
        same(found, made, again)
        assert_listed(again, list(found), list(made))


def assert_follows(there: Function, back: Function, x: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """What comes back is that of the argument, not of what was converted last: x, and other values of its shapes."""
    native = clones(there(x))
    strange = clones(there(other))
    same(back(strange), other, "inverse: to_hf(from_hf(x)) of x of other bits, such as -0.0 and NaN,")
    same(back(native), x, "function: to_hf of from_hf(x), after from_hf of other values of the same shapes,")
    same(there(other), strange, "function: from_hf of x, after to_hf of other values of the same shapes,")
    same(back(strange), other, "function: to_hf of from_hf(x), after to_hf of other values of the same shapes,")
    there(x)
    same(back(strange), other, "function: to_hf of from_hf(x), after from_hf of other values of the same shapes,")


def _watched(name: str, function: Function) -> Function:
    """The function, which must leave its argument as it is."""

    def run(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        own, before = dict(given), clones(given)
        made = function(own)
        assert_pure(name, own, before)
        return made

    return run
