"""Experts under a compiler and exported, for every backend: whole graphs, and the values of plain eager backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import draw, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformed import ARGS, CONFIG, PARAMS, ROUTING, SECOND, Args, X, backward, layer, same, value

from fmoe.backends import BACKENDS
from fmoe.layer.block import moe
from fmoe.types import MoEConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend, **kwargs)


@every_backend
@either
def test_compiled(backend: str, recompute: bool, expected: Args) -> None:
    """fullgraph: no break, no wait for the routing; forward bit for bit what eager gives."""
    f = layer(backend, recompute)
    run = compiled(f)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), ARGS)
    y = run(*leaves)
    assert torch.equal(y, f(*ARGS))
    same(torch.autograd.grad(y.square().sum(), tree_leaves(leaves)), expected)


@every_backend
@either
def test_compiled_func_grad(backend: str, recompute: bool, expected: Args) -> None:
    """The composition that silently drops the gradients of an ordinary autograd.Function."""
    same(compiled(torch.func.grad(value(layer(backend, recompute)), (0, 1, 2)))(*ARGS), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on import
@every_backend
def test_compiled_by_inductor(backend: str) -> None:
    """Of three experts: the compiler makes a program of each that a loop goes over, for seconds."""
    config = replace(CONFIG, n_routed_experts=3)
    x, routing = tokens(config, dtype=torch.float32)
    args = {name: p[:3] for name, p in PARAMS.items()}, x, routing.weights.float()
    f = layer(backend, config=config, routing=routing)
    run = compiled(f, "inductor")
    double = tree_map(lambda t: t.double(), args)
    same(backward(run, *args), tree_map(lambda t: t.float(), backward(layer("loop", False, config, routing), *double)))
    same(run(*args), f(*args))


@every_backend
def test_compiled_with_dynamic_T(backend: str) -> None:
    """What the first number of tokens compiled serves every other."""
    f, grad = layer(backend), torch.func.grad(value(layer(backend)), (0, 1, 2))
    for run in (f, grad):
        counter = CompileCounterWithBackend("aot_eager")
        dynamic = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
        graphs = []
        for T in (9, 7, 4):
            of_T = (X, ARGS[2], ROUTING.indices, ROUTING.mask)
            part = PARAMS, *(t[:T].clone() for t in of_T)
            same(dynamic(*part), run(*part))
            graphs.append(counter.frame_count)
        assert graphs[0] == graphs[-1] > 0


@every_backend
def test_compiled_whole_block(backend: str) -> None:
    """The router too: the routing is computed inside the graph."""
    config = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4)
    params = {f"experts.{name}": p for name, p in draw(config, torch.float32).items()}
    params["gate.weight"] = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    run = lambda params, x: moe(params, x, config, backend=backend)
    same(compiled(run)(params, X), run(params, X))
    same(backward(compiled(run), params, X), backward(run, params, X))


@pytest.mark.parametrize("backend", SECOND)
@pytest.mark.parametrize("compile", [False, True])
def test_selective_checkpointing_by_operator(compile: bool, backend: str, expected: Args) -> None:
    """What the policy saves is not multiplied again: as many products run as without a checkpoint."""
    import fmoe.backends.products  # noqa: F401  defines the operators

    op = torch.ops.fmoe.gmm.default
    asked: list[Any] = []

    def policy(ctx: Any, at: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(at)
        return CheckpointPolicy.MUST_SAVE if at == op else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = lambda: create_selective_checkpoint_contexts(policy)
    f = layer(backend)
    run = lambda *args: checkpoint(f, *args, use_reentrant=False, context_fn=contexts)
    if compile:
        same(backward(compiled(run), *ARGS), expected)
        assert op in asked
        return
    plain, selective, full = Count(), Count(), Count()
    with plain:
        backward(f, *ARGS)
    with selective:
        same(backward(run, *ARGS), expected)
    with full:
        backward(lambda *args: checkpoint(f, *args, use_reentrant=False), *ARGS)
    assert selective.of(op) == plain.of(op) < full.of(op)


@every_backend
def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, params: Any, x: Tensor, weights: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
            return layer(backend)(params, x, weights, indices, mask)

    T = torch.export.Dim("T")
    args = (*ARGS, ROUTING.indices, ROUTING.mask)
    shapes = ({name: None for name in PARAMS}, *({0: T},) * 4)
    module = torch.export.export(Layer(), args, dynamic_shapes=shapes).module()
    for n in (9, 4):
        part = PARAMS, *(t[:n] for t in args[1:])
        assert torch.equal(module(*part), layer(backend)(*part))


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func)
        return func(*args, **(kwargs or {}))

    def of(self, op: Any) -> int:
        return self.ran.count(op)
