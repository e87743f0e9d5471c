"""Tokens within the limits of both generations of DeepEP."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fmoe import MoEConfig, Routing

KINDS = ("buffer", "elastic")
each_kind = pytest.mark.parametrize("kind", KINDS)
WIDE = MoEConfig(n_routed_experts=8, n_activated_experts=3, dim=256, moe_inter_dim=8, expert_bias=True)


def lone(T: int, K: int = 3, seed: int = 0) -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed + 17 * T)
    ids = torch.rand(T, WIDE.n_routed_experts, generator=generator).argsort(1)[:, :K]
    x = torch.randn(T, WIDE.dim, generator=generator).bfloat16()
    return x, Routing(ids, torch.rand(T, K, generator=generator), torch.rand(T, generator=generator) < 0.8)


def said(f: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, RuntimeError, ImportError)) as error:
        f()
    return f"{error.type.__name__}: {error.value}"
