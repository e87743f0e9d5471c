"""The eager twin of every kernel here: slow, plain torch, and the specification.

Each checks what it is given as its kernel does, and looks at where rows end, which a kernel cannot: ValueError.
"""

from fmoe_kernels.reference.codes import decode, gmm_fp8, quantize_rows
from fmoe_kernels.reference.layer import activate, bias_gradient, combine, dact, dw, experts, gmm, up
from fmoe_kernels.reference.routed import Routed, route

__all__ = [
    "Routed",
    "activate",
    "bias_gradient",
    "combine",
    "dact",
    "decode",
    "dw",
    "experts",
    "gmm",
    "gmm_fp8",
    "quantize_rows",
    "route",
    "up",
]
