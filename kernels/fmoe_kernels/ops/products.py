"""The two grouped products by themselves, on rows that are already sorted: raw launches, without autograd.

Each is the other's derivative, so that any layer, and any order of derivatives, can be made of them.
"""

from torch import Tensor

from fmoe_kernels.host.check import ENDS, FLOATS, check, few_enough
from fmoe_kernels.host.launch import Tiling, check_runs, dense
from fmoe_kernels.programs import gmm as gmm_file
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.route import sorted_route
from fmoe_kernels.programs.sums import bias_gradient


def gmm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = x[n] @ w[e] for the rows n of expert e: x [N, K], w [E, K, M] of x's dtype, any strides -> [N, M].

    offsets [E] int32 or int64: where the rows of each expert end; rows after the last end are unspecified. fp16, bf16
    or fp32; waits for nothing. Offsets that fall, or lie outside [0, N], which the host cannot see, are brought there
    on the device. Raises ValueError for tensors that do not fit, and on a CPU outside the interpreter.
    """
    given = {"x": (x, "N K", FLOATS), "w": (w, "E K M", FLOATS), "offsets": (offsets, "E", ENDS)}
    sizes = check("products.gmm", given)
    same("products.gmm", "w", w, x)
    check_runs(x)
    few_enough("products.gmm", "x", len(x))
    if 0 in sizes.values():
        return x.new_zeros(len(x), w.shape[2])
    return gmm_file.gmm(dense(x), w, None, None, sorted_route(x, offsets), Tiling())


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = the sum of x[n]^T y[n] over the rows n of expert e: x [N, K], y [N, M] -> [E, K, M]; 0 without rows.

    offsets, dtypes and errors as in `gmm`. With K = 1, a weighted sum of rows such as a bias gradient, in fp64.
    """
    given = {"x": (x, "N K", FLOATS), "y": (y, "N M", FLOATS), "offsets": (offsets, "E", ENDS)}
    sizes = check("products.tgmm", given)
    same("products.tgmm", "y", y, x)
    check_runs(x)
    few_enough("products.tgmm", "x", len(x))
    out = x.new_empty(len(offsets), x.shape[1], y.shape[1])
    if 0 in sizes.values():
        return out.zero_()
    r = sorted_route(x, offsets)
    if x.shape[1] == 1:
        return bias_gradient(dense(y), x.flatten(), r, x.dtype)[:, None]
    return dw(dense(x), dense(y), r, out, Tiling())


def same(who: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises ValueError where a tensor's dtype is not that of x."""
    if tensor.dtype != x.dtype:
        raise ValueError(f"{who}: {name} is {tensor.dtype}, expected {x.dtype}, as x")
