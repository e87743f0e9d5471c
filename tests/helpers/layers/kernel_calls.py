"""Calls of every public kernel that fit, for laws over all of them: a function, and its arguments by name."""

from collections.abc import Callable
from typing import Any

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import torch
from fmoe_kernels import activations, products
from fmoe_kernels.programs import fp8
from fmoe_kernels.programs.codes import Coded
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.scalars import SCALARS
from torch import Tensor

new = lambda *shape: torch.ones(shape, device=kernel_cases.DEVICE)
ids = lambda *shape: torch.zeros(shape, dtype=torch.long, device=kernel_cases.DEVICE)
E, K, M, N = 2, 4, 6, 5


def ends(*values: int) -> Tensor:
    return torch.tensor(values, device=kernel_cases.DEVICE)


LAYER = dict(x=new(N, K), indices=ids(N, 1), weights=new(N, 1), mask=new(N) > 0, w_up=new(E, K, 2 * M))
LAYER |= dict(w_down=new(E, M, K), b_up=new(E, 2 * M), b_down=new(E, K))
W8 = new(E, K, M).to(fp8.E4M3)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "experts": (fmoe_kernels.experts, LAYER),
    "products.gmm": (products.gmm, dict(x=new(N, K), w=new(E, K, M), offsets=ends(2, N))),
    "products.tgmm": (products.tgmm, dict(x=new(N, K), y=new(N, M), offsets=ends(2, N))),
    "products.gmm_codes": (
        lambda x, words, scale, offsets: products.gmm_codes(x, Coded(words, scale, None, "e4m3", (0, 0)), offsets),
        dict(x=new(N, K), words=new(E, K, M).byte(), scale=new(E, 1, 1), offsets=ends(2, N)),
    ),
    "fp8.gmm": (fp8.gmm, dict(x=new(N, K), w=W8, w_scale=new(E, 1, 1), offsets=ends(2, N))),
    "fp8.quantize_rows": (fp8.quantize_rows, dict(x=new(N, K))),
    "make_route": (lambda indices, mask: make_route(indices, mask, E), dict(indices=ids(N, 1), mask=new(N) > 0)),
} | {name: (getattr(activations, name), dict(u=new(N, K), p=new(N, 1))) for name in SCALARS}

DAMAGE: dict[str, Callable[[Tensor], Any]] = {
    "no tensor": lambda t: t.tolist(),
    "None": lambda t: None,
    "a dimension more": lambda t: t[..., None],
    "a dimension less": lambda t: t.flatten()[:0] if t.ndim > 1 else t.sum(),
    "first size": lambda t: torch.cat([t.float(), t[:1].float()]).to(t.dtype),
    "last size": lambda t: t[..., :-1] if t.shape[-1] > 1 else torch.cat([t, t], -1),
    "complex": lambda t: t.to(torch.complex64),
    "another kind": lambda t: t.int() if t.is_floating_point() or t.dtype == torch.bool else t.float(),
    "bytes": lambda t: t.to(torch.bool) if t.dtype != torch.bool else t.to(torch.uint8),
    "elsewhere": lambda t: t.to("meta"),
    "sparse": lambda t: t.float().to_sparse(),
}
"""What a tensor may be instead."""
