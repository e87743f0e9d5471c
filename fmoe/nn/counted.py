"""Slots counted by a module: once, also where a checkpoint computes its forward again."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fmoe.layer.recompute import recomputing


def count_once(counted: Tensor, more: Tensor) -> None:
    """counted += more in place, except in a forward that is computed again. int64 [E] both.

    Of a compiled graph that is asked when it runs: a checkpoint around it runs the same graph again.

    >>> counted = torch.zeros(2, dtype=torch.int64)
    >>> count_once(counted, torch.tensor([3, 1]))
    >>> counted
    tensor([3, 1])
    """
    if torch.compiler.is_exporting():
        counted.add_(more)
    elif torch.compiler.is_compiling():
        _in_a_graph(counted, more)
    elif not recomputing():
        counted.add_(more)


@torch.library.custom_op("fmoe::count_once", mutates_args=("counted",))
def _in_a_graph(counted: Tensor, more: Tensor) -> None:
    if not recomputing():
        counted.add_(more)


@register_flop_formula(torch.ops.fmoe.count_once)
def _flops(*_: object, **__: object) -> int:
    return 0  # integers alone


@_in_a_graph.register_fake
def _(counted: Tensor, more: Tensor) -> None:
    return None
