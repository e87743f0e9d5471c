"""One small layer, its value and its gradients, for every transform to be compared with."""

from collections.abc import Callable
from typing import Any

import torch
from naive import draw, tokens
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fmoe.backends import BACKENDS
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4, expert_bias=True)
PARAMS, (X, ROUTING) = draw(CONFIG, torch.float32), tokens(CONFIG, dtype=torch.float32)
PARAMS |= {
    name: 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for name, shape in {"lora_down_A": (5, 4, 2), "lora_down_B": (5, 2, 6)}.items()
}
ARGS = PARAMS, X, ROUTING.weights.float()
SECOND = [name for name in BACKENDS if name != "triton"]  # whose derivatives have derivatives
Args = tuple[dict[str, Tensor], Tensor, Tensor]


def layer(
    backend: str, recompute: bool = False, config: MoEConfig = CONFIG, routing: Routing = ROUTING
) -> Callable[..., Tensor]:
    def f(
        params: dict[str, Tensor],
        x: Tensor,
        weights: Tensor,
        indices: Tensor = routing.indices,
        mask: Tensor | None = routing.mask,
    ) -> Tensor:
        return experts(params, x, Routing(indices, weights, mask), config, backend=backend, recompute=recompute)

    return f


def value(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).square().sum()


def backward(f: Callable[..., Tensor], *args: Any) -> Any:
    """The gradient of value(f) in all of args, by `.backward()`."""
    leaves = tree_map(lambda t: t.detach().clone().requires_grad_(), args)
    value(f)(*leaves).backward()
    return tree_map(lambda t: t.grad, leaves)


def same(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Relative norm of the difference, tensor by tensor; and what is expected is not all zero."""
    assert any(t.any() for t in tree_leaves(expected))
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()  # a NaN fails
