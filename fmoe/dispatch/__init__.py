"""Who moves tokens: a `Dispatcher` is three functions, and dispatch and combine are each other's transpose.

    plan      the one step that looks at the routing: integers only, no gradient, may synchronise
    dispatch  linear: x and weights -> rows sorted by expert
    combine   linear: rows -> [T, D], the sum of the copies of each token

Laws: <dispatch(x).x, r> == <x, combine(r)>, and combine(dispatch(x).x)[t] == n(t) * x[t] with n(t) the number of
experts that token t went to. A plan is a value: whoever recomputes with the same plan gets the same rows.
`fmoe.dispatch.local` is the dispatcher of one device, where nothing moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Dispatcher(NamedTuple):
    """(plan, dispatch, combine): see the head of this file.

    plan(routing, config) -> plan. dispatch(x [T, D], weights [T, K], plan) -> Rows. combine(rows [N, D], plan) ->
    [T, D], summed in fp32 (fp64 stays) and not rounded back.
    """

    plan: Callable[[Routing, MoEConfig], Any]
    dispatch: Callable[[Tensor, Tensor, Any], Rows]
    combine: Callable[[Tensor, Any], Tensor]
