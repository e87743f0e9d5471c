"""FLOP formulas of the operators, for `torch.utils.flop_counter`: products alone, two for each multiplication.

The number of routed rows is the device's to know, so all T K slots count; activations count for nothing, as those of
PyTorch do.
"""

from typing import Any

import torch

from fmoe_kernels.host.flops import formula
from fmoe_kernels.ops import custom  # noqa: F401  defines the operators
from fmoe_kernels.programs import activations  # noqa: F401


@formula(torch.ops.fmoe_kernels.experts_forward)
def forward(x: Any, indices: Any, weights: Any, mask: Any, w_up: Any, w_down: Any, *_: Any, **__: Any) -> int:
    """2 T K (D U + I D)."""
    T, K = indices
    return 2 * T * K * (w_up[1] * w_up[2] + w_down[1] * w_down[2])


@formula(torch.ops.fmoe_kernels.experts_backward)
def backward(
    dy: Any, x: Any, z: Any, slots: Any, tokens: Any, inverse: Any, offsets: Any, weights: Any, w_up: Any,
    w_down: Any, b_up: Any, b_down: Any, activation: str, alpha: float, limit: float, batch_invariant: bool,
    table: str, needs: Any, **_: Any,
) -> int:  # fmt: skip
    """Of down one product back through it and one for its gradient, of up one for each gradient that is needed.

    Where z was not kept, one more for it.
    """
    need_x, _need_weights, need_up, need_down, *_biases = needs
    up, down = w_up[1] * w_up[2], w_down[1] * w_down[2]
    again = z[0] == 0
    return 2 * inverse[0] * (up * (need_x + need_up + again) + down * (1 + need_down))


@formula(torch.ops.fmoe_kernels.act_forward)
@formula(torch.ops.fmoe_kernels.act_backward)
def activation(*_: Any, **__: Any) -> int:
    """0: no product."""
    return 0
