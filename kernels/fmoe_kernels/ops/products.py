"""The two grouped products by themselves, on rows that are already sorted: raw launches, without autograd.

Each is the other's derivative, so that any layer, and any order of derivatives, can be made of them.
"""

import torch
from torch import Tensor

from fmoe_kernels.host.launch import Tiling, check_device, dense
from fmoe_kernels.programs import gmm as gmm_file
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.route import sorted_route
from fmoe_kernels.programs.sums import bias_gradient


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ w[e] for the rows n of expert e: x [N, K], w [E, K, M] of x's dtype, any strides -> [N, M].

    offsets [E]: where the rows of each expert end; rows after the last end are unspecified. fp16, bf16 or fp32; waits
    for nothing. Raises ValueError on a CPU outside the interpreter.
    """
    check_device(x)
    if len(x) == 0:
        return x.new_empty(0, w.shape[2])
    with torch.accelerator.device_index(x.device.index):
        return gmm_file.gmm(dense(x), w, None, None, sorted_route(x, offsets), Tiling())


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = the sum of x[n]^T y[n] over the rows n of expert e: x [N, K], y [N, M] -> [E, K, M]; 0 without rows.

    offsets, dtypes and errors as in `gmm`. With K = 1, a weighted sum of rows such as a bias gradient, in fp64.
    """
    check_device(x)
    out = x.new_empty(len(offsets), x.shape[1], y.shape[1])
    if len(x) == 0:
        return out.zero_()
    with torch.accelerator.device_index(x.device.index):
        r = sorted_route(x, offsets)
        if x.shape[1] == 1:
            return bias_gradient(dense(y), x.flatten(), r, x.dtype)[:, None]
        return dw(dense(x), dense(y), r, out, Tiling())
