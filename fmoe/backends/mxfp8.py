"""The backend `torch_mm_mxfp8`: torchao's grouped products in MXFP8 (e4m3, a power-of-two scale for each 32 values).

Both operands of forward and of the gradient of the rows are quantised at each call; the gradients of weights are
products in high precision. What is asked for is what runs: where it cannot, there is an error with the reason.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from fmoe.backends.mlp import mlp
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

PLACES = ("torchao.prototype.moe_training.mxfp8_grouped_mm", "torchao.prototype.moe_training")
NAME = "_to_mxfp8_then_scaled_grouped_mm"
OPTIONS = {"wgrad_with_hp": True, "pad_token_groups_for_grouped_mm": True}


def torch_mm_mxfp8(params: Params, rows: Rows, config: MoEConfig) -> Tensor:
    """`mlp` with both products of weights in MXFP8; biases and LoRA as the backend `torch_mm` has them.

    Raises ImportError where torchao has no such product, ValueError for x other than bf16 or a GPU before sm_100.
    """
    multiply, (major, minor) = grouped_mm(), capability(rows.x)
    if major < 10 or rows.x.dtype != torch.bfloat16:
        found = f"{rows.x.dtype} on {rows.x.device}" + (f" (sm_{major}{minor})" if major else "")
        raise ValueError(f"backend 'torch_mm_mxfp8': x is {found}, expected bfloat16 on a GPU of sm_100 or later")

    def weigh(h: Tensor, name: str, offsets: Tensor) -> Tensor:
        # torchao quantises along K, and reads its second operand as the transpose of a dense one
        w = params[name].to(h.dtype).mT.contiguous().mT
        return multiply(h.contiguous(), w, offsets)

    return mlp(params, rows, config, by="torch_mm", weigh=weigh)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the GPU that holds x; (0, 0) elsewhere."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda and not torch.version.hip else (0, 0)


@lru_cache
def grouped_mm() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torchao's product (x [N, K], w [E, K, M], offsets) -> [N, M]. Raises ImportError, with the reason, without it."""
    reasons = []
    for place in PLACES:
        try:
            found = getattr(import_module(place), NAME)
            lacking = OPTIONS.keys() - inspect.signature(found).parameters.keys()
        except Exception as error:  # what is half installed fails in every way
            reasons.append(f"{place}: {type(error).__name__}: {error}")
            continue
        if not lacking:
            return lambda x, w, offsets: found(x, w, offsets, **OPTIONS)
        reasons.append(f"{place}.{NAME} has no {', '.join(sorted(lacking))}")
    raise ImportError(
        f"backend 'torch_mm_mxfp8' cannot run here: {'; '.join(reasons)}; `pip install -U torchao`, or 'torch_mm'"
    )
