"""Who moves tokens: a `Dispatcher` is three functions, and dispatch and combine are each other's transpose.

    plan      the one step that looks at the routing: integers only, no gradient, may synchronise
    dispatch  linear: x and weights -> rows sorted by expert
    combine   linear: rows -> [T, D], the sum of the copies of each token

Laws: <dispatch(x).x, r> == <x, combine(r)>, and combine(dispatch(x).x)[t] == n(t) * x[t] with n(t) the number of
experts that token t went to. A plan is a value: whoever recomputes with the same plan gets the same rows.

    local               the dispatcher of one device, where nothing moves
    all_to_all(group)   each routed row to the rank that has its expert, and back
    all_gather(group)   every token to every rank, and partial sums back
    deepep(group, ..)   each token to the ranks that have its experts, and back, by DeepEP's kernels

The last three are made by the caller, on every rank of a torch.distributed group, and closed by him, best by `with`.
"""

from fmoe.dispatch.all_gather import all_gather
from fmoe.dispatch.all_to_all import all_to_all
from fmoe.dispatch.deepep import deepep
from fmoe.dispatch.local import local
from fmoe.dispatch.rows import Dispatcher, Rows
from fmoe.entrance import held

__all__ = ["Dispatcher", "Rows", "all_gather", "all_to_all", "deepep", "local"]

held(globals(), "all_gather all_to_all deepep", error=ValueError)
