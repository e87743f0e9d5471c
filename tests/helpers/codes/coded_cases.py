"""Backends and formats for experts on their codes, and what equal means for each."""

from typing import Any

import pytest
import torch
from kept import FORMATS
from torch import Tensor

from fmoe.backends import BACKENDS
from fmoe.backends.loop import loop
from fmoe.types import MoEConfig

FEW = ["fp8 blocks", "mxfp4 blocks", "nvfp4", "int4 pack"]


def mine(params: Any, rows: Any, config: MoEConfig) -> Tensor:
    """A backend of one's own, which has never heard of codes."""
    assert all(p.is_floating_point() and p.dtype.itemsize > 1 for p in params.values()) and len(rows.counts) == 1
    return loop(params, rows, config)


EVERY = {**BACKENDS, "one's own": mine}
every_format = pytest.mark.parametrize("fmt", FORMATS)
few_formats = pytest.mark.parametrize("fmt", FEW)
every_backend = pytest.mark.parametrize("backend", EVERY.values(), ids=EVERY)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected["y"].any() and expected["x"].any()
    for name, t in expected.items():
        assert torch.equal(found[name], t), name
