"""The reference backend: one expert after the other, plain torch. Every other backend must agree with it."""

from torch import Tensor

from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params


def loop(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """`mlp`, one expert after the other: waits for the device, takes every dtype, and copies no unused expert."""
    from fmoe.backends.mlp import mlp  # on first use: it needs torch._dynamo, which takes a second and loads triton

    return mlp(params, rows, config, by="loop")
