"""Batch invariance: a backend that multiplies one row at a time gives a row the same bits whatever stands beside it."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fmoe.backends import Backend
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params


def one_by_one(backend: Backend) -> Backend:
    """The backend, called for each row alone.

    BLAS rounds a row by how many rows there are, and an activation by where its vectors end: nothing less is
    invariant on every machine. The host reads nothing, so that it compiles and batches as the backend does.

    >>> from fmoe.backends import BACKENDS
    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> rows = Rows(torch.tensor([[2.0], [3.0]]), torch.tensor([1.0, 0.5]), torch.tensor([1, 1]))
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> one_by_one(BACKENDS["loop"])(params, rows, config).flatten().tolist()
    [4.0, 45.0]
    """

    def alone(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
        N, E = len(rows.x), len(rows.counts)
        bare = rows.x.is_meta or (isinstance(rows.x, FakeTensor) and not torch.compiler.is_compiling())
        if N == 0 or bare:  # without data there is nothing to depend on
            return backend(params, rows, config)
        ids = torch.arange(E, device=rows.x.device)
        # the expert of each row; E, which is none, for those after the last expert's
        expert = (torch.arange(N, device=rows.x.device)[:, None] >= rows.counts.cumsum(0)).sum(1)
        counts = (expert[:, None] == ids).long()
        each = [
            backend(params, Rows(x.clone(), w.clone(), count), config)
            for x, w, count in zip(rows.x.split(1), rows.weights.split(1), counts, strict=True)
        ]
        return torch.cat(each)

    return alone
