"""Scalar activations: (g, v, alpha, limit) -> (act, its derivative by g, its derivative by v), element by element.

Each is one function, an argument of every kernel: what a kernel does not use, the compiler drops. Clamps pass NaN on,
and give no gradient beyond their limit. The eager twins are in `reference`.
"""

import math

import triton
import triton.language as tl

from fmoe_kernels.host.check import GATED


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def clip_above(z, limit):
    """(min(z, limit), derivative)."""
    return tl.minimum(z, limit, propagate_nan=tl.PropagateNan.ALL), tl.where(z > limit, 0.0, 1.0)


@triton.jit
def clip(z, limit):
    """(min(max(z, -limit), limit), derivative): the upper limit wins when limit < 0, as in torch.clamp."""
    y = tl.maximum(z, -limit, propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, limit, propagate_nan=tl.PropagateNan.ALL)
    return y, tl.where(y == z, 1.0, 0.0)


@triton.jit
def swiglu(g, v, alpha, limit):
    """silu(g) * v."""
    s = sigmoid(g)
    y = g * s
    return y * v, (s + y * (1 - s)) * v, y


@triton.jit
def swiglu_clamped(g, v, alpha, limit):
    """silu(min(g, limit)) * clip(v, limit)."""
    g, dg = clip_above(g, limit)
    v, dv = clip(v, limit)
    s = sigmoid(g)
    y = g * s
    return y * v, (s + y * (1 - s)) * v * dg, y * dv


@triton.jit
def quick_geglu(g, v, alpha, limit):
    """g' * sigmoid(alpha g') * (v' + 1), g' = min(g, limit) and v' = clip(v, limit), whatever the sign of limit."""
    g, dg = clip_above(g, limit)
    v, dv = clip(v, limit)
    s = sigmoid(alpha * g)
    y = g * s
    return y * (v + 1), (s + alpha * y * (1 - s)) * (v + 1) * dg, y * dv


@triton.jit
def geglu(g, v, alpha, limit):
    """gelu(g) * v, gelu's tanh form: (1 + tanh(k)) / 2 = sigmoid(2 k), k = sqrt(2 / pi) * (g + 0.044715 g^3)."""
    two_k = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    s = sigmoid(two_k)
    slope = 1.5957691216057308 * (1 + 0.134145 * g * g)
    y = g * s
    return y * v, (s + y * (1 - s) * slope) * v, y


@triton.jit
def tanh(z):
    """tanh without the cancellation of 2 sigmoid(2 z) - 1 near 0: a continued fraction there."""
    w = z * z
    near = z * (135135 + w * (17325 + w * (378 + w))) / (135135 + w * (62370 + w * (3150 + w * 28)))
    return tl.where(w < 1, near, 2 * sigmoid(2 * z) - 1)


@triton.jit
def situ(g, v, alpha, limit):
    """alpha * tanh(g / alpha) * sigmoid(g) * limit * tanh(v / limit); v itself where limit is not above 0."""
    s, t = sigmoid(g), tanh(g / alpha)
    y = alpha * t * s
    bounded = tl.where(limit > 0, limit, 1.0)
    c = tanh(v / bounded)
    up = tl.where(limit > 0, bounded * c, v)
    return y * up, ((1 - t * t) * s + y * (1 - s)) * up, y * tl.where(limit > 0, 1 - c * c, 1.0)


@triton.jit
def relu2(g, v, alpha, limit):
    """max(g, 0)^2: not gated, v is not used."""
    y = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y * y, 2 * y, y * 0


@triton.constexpr_function
def epilogue_type(dtype):
    """What activations are computed in: fp32, and fp64 for fp32 data, whose last bits then are those of the product."""
    return tl.float64 if dtype == tl.float32 else tl.float32


SCALARS = {
    "swiglu": swiglu,
    "swiglu_clamped": swiglu_clamped,
    "swiglu_oai": quick_geglu,  # on halves; see `bound`
    "quick_geglu": quick_geglu,
    "geglu": geglu,
    "relu2": relu2,
    "situ": situ,
}
"""Activations by name."""


def _backward(act):
    @triton.jit
    def element(q, g, v, weight, alpha, limit):
        y, dg, dv = act(g, v, alpha, limit)
        by_z = q * weight
        return y * weight, q * y, by_z * dg, by_z * dv

    return element


BACKWARD = {name: _backward(act) for name, act in SCALARS.items()}
"""(q, g, v, weight, alpha, limit) -> (weight * act, q * act, and weight * q times both derivatives), of one element.

For `tl.map_elementwise`: one function of an element is computed once, in one layout, whatever its results are for.
"""

INTERLEAVED = {name: name == "quick_geglu" for name in GATED}
"""Are they [g0, v0, g1, v1, ..] rather than [g, v]?"""


def bound(name: str, limit: float) -> float:
    """The limit as kernels take it: swiglu_oai clips only where limit > 0.

    >>> bound("swiglu_oai", 0.0), bound("quick_geglu", 0.0)
    (inf, 0.0)
    """
    return math.inf if name == "swiglu_oai" and limit <= 0 else float(limit)
