"""Gradients that autograd takes in batches (`is_grads_batched`, `vectorize`): those that a loop over it gives.

It is an older vmap, which asks no Function how it is batched and hides from autograd that a batch requires a gradient.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import draw, tokens
from test_moe import CONFIGS
from test_moe import draw as draw_block
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.utils.checkpoint import checkpoint
from transformed import CONFIG, PARAMS, SECOND, layer

from fmoe.layer.block import moe

Call = tuple[Callable[..., Tensor], list[Tensor]]
BARE = replace(CONFIG, expert_bias=False)


def of_experts(backend: str, bare: bool, recompute: bool) -> Call:
    """bare: weights alone, and every slot goes somewhere; else masked tokens, biases and LoRA."""
    x, routing = tokens(CONFIG, T=3)
    routing = routing._replace(indices=routing.indices % 5, mask=None) if bare else routing
    params = {n: p.double() for n, p in (draw(BARE) if bare else PARAMS).items()}
    f = layer(backend, recompute, BARE if bare else CONFIG, routing)
    run = lambda x, w, *values: f(dict(zip(params, values, strict=True)), x, w)
    return run, [x, routing.weights.double(), *params.values()]


def of_block(name: str) -> Call:
    config = CONFIGS[name]
    params = draw_block(config)
    fixed = {n: params.pop(n) for n in [*params] if n.endswith("correction_bias")}  # which has no gradient
    x = torch.randn(2, config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return lambda x, *values: moe(fixed | dict(zip(params, values, strict=True)), x, config), [x, *params.values()]


CALLS: dict[str, Callable[[], Call]] = {
    f"{backend}, {'bare' if bare else 'masked'}{', recompute' * again}": lambda b=backend, i=bare, r=again: of_experts(
        b, i, r
    )
    for backend in SECOND
    for bare in (True, False)
    for again in (False, True)
} | {f"moe, {name}": lambda name=name: of_block(name) for name in CONFIGS}
every_call = pytest.mark.parametrize("name", CALLS)


def same(found: Any, wanted: Any) -> None:
    assert any(t.any() for t in wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_call
@pytest.mark.parametrize("how", ["plain", "create_graph", "checkpoint"])
def test_a_batch_of_gradients(how: str, name: str) -> None:
    f, args = CALLS[name]()
    leaves = [t.detach().requires_grad_() for t in args]
    y = checkpoint(f, *leaves, use_reentrant=False) if how == "checkpoint" else f(*leaves)
    batch = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    used = dict(retain_graph=True, create_graph=how == "create_graph")
    found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, **used)
    wanted = [torch.stack(g) for g in zip(*(torch.autograd.grad(y, leaves, g, **used) for g in batch), strict=True)]
    same(found, wanted)
    if how == "create_graph":  # and these have derivatives
        unused = dict(allow_unused=True, materialize_grads=True)  # a last bias is in no derivative
        again = lambda grads: torch.autograd.grad(
            sum(g.square().sum() for g in grads), leaves, retain_graph=True, **unused
        )
        same(again(found), again(wanted))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on import
@every_call
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_a_jacobian_and_a_hessian_at_once(strategy: str, name: str) -> None:
    f, args = CALLS[name]()
    args = args[:2]
    rest = CALLS[name]()[1][2:]
    g = lambda *a: f(*a, *rest)
    value = lambda *a: g(*a).square().sum()
    if strategy == "forward-mode" and "recompute" in name:
        with pytest.raises(NotImplementedError, match="recompute=True: forward mode"):
            jacobian(g, tuple(args), vectorize=True, strategy=strategy)
        return
    same(jacobian(g, tuple(args), vectorize=True, strategy=strategy), jacobian(g, tuple(args)))
    found = hessian(value, tuple(args), vectorize=True, outer_jacobian_strategy=strategy)
    for row, wanted in zip(found, hessian(value, tuple(args)), strict=True):
        same(row, wanted)
