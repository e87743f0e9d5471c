"""The backend of `torch.nn.functional.grouped_mm`: one call multiplies the rows of all experts."""

from torch import Tensor

from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params


def torch_mm(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """`mlp` by grouped_mm: on a GPU it waits for nothing. Every dtype; fp64 runs as `loop` does.

    >>> import torch
    >>> rows = Rows(torch.tensor([[2.0]]), torch.ones(1), torch.tensor([1]))
    >>> config = MoEConfig(n_routed_experts=1, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> torch_mm({"gate_and_up_projs": torch.ones(1, 1, 1), "down_projs": torch.ones(1, 1, 1)}, rows, config)
    tensor([[4.]])
    """
    from fmoe.backends.mlp import mlp  # on first use: it needs torch._dynamo, which takes a second and loads triton

    return mlp(params, rows, config, by="torch_mm")
