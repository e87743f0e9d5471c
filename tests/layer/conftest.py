"""What several tests of the layer begin with."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map
from transformed import ARGS, backward, layer


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def expected() -> Any:
    """Gradients of the reference in fp64, as fp32."""
    double = tree_map(lambda t: t.double(), ARGS)
    return tree_map(lambda t: t.float(), backward(layer("loop"), *double))
