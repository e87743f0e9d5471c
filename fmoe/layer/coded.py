"""Experts in codes on any backend: one that takes none is called for each expert, whose matrices are decoded for it.

Backward decodes again. `fmoe/backends/coded.py` is the same below a backend's own products.
"""

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fmoe.backends import Backend
from fmoe.backends.held import in_codes, shapes, stacks
from fmoe.codecs.stacks import is_beside
from fmoe.dispatch import Rows
from fmoe.dispatch.local import batched
from fmoe.layer.recompute import recompute
from fmoe.types import MoEConfig, Params


def by_expert(backend: Backend, name: str) -> Backend:
    """The backend, called for each expert that has rows, with its matrices decoded to the dtype of the rows.

    The host reads how many rows each expert has. So torch.compile leaves its graph here, and a vmap over routings
    raises ValueError with the backend's name.

    >>> from fmoe.backends import BACKENDS
    >>> codes, scale = torch.full((2, 32, 32), 56, dtype=torch.uint8), torch.ones(2, 1, 1)  # 56: 1 in e4m3
    >>> params = {n: codes.view(torch.float8_e4m3fn) for n in ("gate_and_up_projs", "down_projs")}
    >>> params |= {f"{n}_scale_each": scale for n in params}
    >>> config = MoEConfig(
    ...     n_routed_experts=2, n_activated_experts=1, dim=32, moe_inter_dim=32, expert_activation="relu2"
    ... )
    >>> rows = Rows(torch.ones(1, 32), torch.ones(1), torch.tensor([0, 1]))
    >>> by_expert(BACKENDS["loop"], "loop")(params, rows, config)[0, 0]  # 32 products of 32^2
    tensor(32768.)
    """

    @torch.compiler.disable(reason=f"backend {name!r} takes no codes: it is called for each expert that has rows")
    def each(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
        held = in_codes(params)
        if rows.counts.is_meta or isinstance(rows.counts, FakeTensor):
            whole = {n: rows.x.new_empty(shape) for n, shape in shapes(params, held).items()}
            return backend(_plain(params) | whole, rows, config)
        if batched(rows.counts):
            told = "expected a routing that the host can read: not one for each member of a vmap"
            raise ValueError(f"backend {name!r}: parameters are codes, {told}. Fix: the backend 'loop', or decode them")
        ends = [0, *accumulate(rows.counts.tolist())]
        made: list[Tensor] = []
        for e, (start, end) in enumerate(pairwise(ends)):
            if start < end or (e == 0 and not ends[-1]):  # of no rows at all, those of the first
                mine = {n: p[e : e + 1] if p.ndim else p for n, p in params.items()}
                made.append(recompute(alone, mine, rows.x[start:end], rows.weights[start:end], config, e))
        return torch.cat([*made, made[0].new_zeros(len(rows.x) - ends[-1], made[0].shape[1])])

    def alone(params: Params, x: Tensor, weights: Tensor, config: MoEConfig, e: int) -> Tensor:
        held = stacks(params, config, x.dtype)
        decoded: dict[str, Tensor] = {n: replace(codes, first=e)[0][None] for n, codes in held.items()}
        counts = torch.tensor([len(x)], device=x.device)
        return backend(_plain(params) | decoded, Rows(x, weights, counts), config)

    return each


def _plain(params: Params) -> dict[str, Any]:
    return {n: p for n, p in params.items() if not is_beside(n, params)}
