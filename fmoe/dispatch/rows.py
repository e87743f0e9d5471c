"""The nouns of dispatch: the rows that a device multiplies, and who moves tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

from torch import Tensor

from fmoe.types import MoEConfig, Routing


class Rows(NamedTuple):
    """What one device multiplies: counts[e] rows for each of its experts e in turn.

    x [N, D]. weights [N] fp32, or fp64 if x or the routing weights are. counts [E] int64, summing to N; or, where the
    host cannot read a routing, to less: rows after the sum are zero, and what a backend makes of them is dropped.
    """

    x: Tensor
    weights: Tensor
    counts: Tensor


def _nothing() -> None:
    pass


class Dispatcher(NamedTuple):
    """(plan, dispatch, combine): see the head of `fmoe.dispatch`.

    plan(routing, config) -> plan. dispatch(x [T, D], weights [T, K], plan) -> Rows. combine(rows [N, D], plan) ->
    [T, D], summed in fp32 (fp64 stays) and not rounded back. close() gives back what the three hold, if anything;
    `with dispatcher as d:` closes at its end.
    """

    plan: Callable[[Routing, MoEConfig], Any]
    dispatch: Callable[[Tensor, Tensor, Any], Rows]
    combine: Callable[[Tensor, Any], Tensor]
    close: Callable[[], None] = _nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
