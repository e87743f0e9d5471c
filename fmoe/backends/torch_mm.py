"""The backend of `torch.nn.functional.grouped_mm`: one call multiplies the rows of all experts."""

from torch import Tensor

from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params


def torch_mm(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """`mlp` by grouped_mm: on a GPU it waits for nothing. Every dtype; fp64 runs as `loop` does."""
    from fmoe.backends.mlp import mlp  # on first use: it needs torch._dynamo, which takes a second and loads triton

    return mlp(params, rows, config, by="torch_mm")
