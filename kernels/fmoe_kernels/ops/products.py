"""The two grouped products by themselves, on rows that are already sorted: raw launches, without autograd.

Each is the other's derivative, so that any layer, and any order of derivatives, can be made of them.
"""

from torch import Tensor

from fmoe_kernels.host.check import ENDS, FLOATS, check, check_same, few_enough
from fmoe_kernels.host.codes import KINDS, check_code, check_scales
from fmoe_kernels.host.launch import Tiling, check_runs, dense, flat
from fmoe_kernels.programs import codes
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
    check_same("products.gmm", "x", x, w=w)
    check_runs(x=x, w=w, offsets=offsets)
    few_enough("products.gmm", "x", len(x))
    if 0 in sizes.values():
        return x.new_zeros(len(x), w.shape[2])
    return gmm_file.gmm(dense(x), w.resolve_neg(), None, None, sorted_route(x, offsets), Tiling())


def gmm_codes(x: Tensor, w: codes.Coded, offsets: Tensor) -> Tensor:
    """`gmm` by matrices that are codes, each tile decoded as it is loaded: x [N, K], w [E, K, M] (or turned) -> [N, M].

    Raises ValueError for codes and scales whose shapes or dtypes do not fit, blocks that are no powers of two, and a
    second scale beside scales that are no e4m3 of single columns.
    """
    _check_coded(w)
    packed, (words, scale, second, code, block, *_, turned) = w.packed, w
    given = {"x": (x, "N M" if turned else "N K", FLOATS), "words": (words, "E k M", (KINDS[code],))}
    known = {"k": x.shape[1] // packed} if isinstance(x, Tensor) and x.ndim == 2 and not turned else {}
    sizes = check("products.gmm_codes", given | {"offsets": (offsets, "E", ENDS)}, **known)
    sizes["K"] = sizes["k"] * packed
    if not turned and x.shape[1] != sizes["K"]:
        raise ValueError(f"products.gmm_codes: x is {list(x.shape)}, expected [N, K={sizes['K']}], as words say")
    check_scales("products.gmm_codes", {"x": given["x"]}, scale, second, code, block, sizes)
    check_runs(x=x, words=words, scale=scale, second=second, offsets=offsets)
    few_enough("products.gmm_codes", "x", len(x))
    w = w._replace(words=words.resolve_neg(), scale=scale.resolve_neg())
    w = w if second is None else w._replace(second=second.resolve_neg())
    if 0 in sizes.values():
        return x.new_zeros(len(x), sizes["K" if turned else "M"])
    return codes.gmm(dense(x), w, sorted_route(x, offsets), Tiling())


def _check_coded(w: codes.Coded) -> None:
    """Raises ValueError for what is no Coded, or one whose facts are none that the kernel has."""
    who = "products.gmm_codes"
    if not isinstance(w, codes.Coded):
        raise ValueError(f"{who}: w is of type {type(w).__name__}, expected fmoe_kernels.programs.codes.Coded")
    check_code(who, w.code, w.block, w.second, divides=w.divides, late=w.late, turned=w.turned)


def tgmm(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """out[e] = the sum of x[n]^T y[n] over the rows n of expert e: x [N, K], y [N, M] -> [E, K, M]; 0 without rows.

    offsets, dtypes and errors as in `gmm`. With K = 1, a weighted sum of rows such as a bias gradient, in fp64.
    """
    given = {"x": (x, "N K", FLOATS), "y": (y, "N M", FLOATS), "offsets": (offsets, "E", ENDS)}
    sizes = check("products.tgmm", given)
    check_same("products.tgmm", "x", x, y=y)
    check_runs(x=x, y=y, offsets=offsets)
    few_enough("products.tgmm", "x", len(x))
    out = x.new_empty(len(offsets), x.shape[1], y.shape[1])
    if 0 in sizes.values():
        return out.zero_()
    r = sorted_route(x, offsets)
    if x.shape[1] == 1:
        return bias_gradient(dense(y), flat(x), r, x.dtype)[:, None]
    return dw(dense(x), dense(y), r, out, Tiling())
