"""Experts under every transform of PyTorch, for every backend: the values and gradients of plain eager backward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from naive import draw, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fmoe.backends import BACKENDS
from fmoe.layer.block import moe
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

every_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
Args = tuple[dict[str, Tensor], Tensor, Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def layer(backend: str, recompute: bool = False) -> Callable[..., Tensor]:
    def f(
        params: dict[str, Tensor],
        x: Tensor,
        weights: Tensor,
        indices: Tensor = ROUTING.indices,
        mask: Tensor | None = ROUTING.mask,
    ) -> Tensor:
        return experts(params, x, Routing(indices, weights, mask), CONFIG, backend=backend, recompute=recompute)

    return f


def value(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).square().sum()


def backward(f: Callable[..., Tensor], *args: Any) -> Any:
    """The gradient of value(f) in all of args, by `.backward()`."""
    leaves = tree_map(lambda t: t.detach().clone().requires_grad_(), args)
    value(f)(*leaves).backward()
    return tree_map(lambda t: t.grad, leaves)


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend, **kwargs)


def same(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Relative norm of the difference, tensor by tensor; and what is expected is not all zero."""
    assert any(t.any() for t in tree_leaves(expected))
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()  # a NaN fails


@pytest.fixture(scope="module")
def expected() -> Any:
    """Gradients of the reference in fp64, as fp32."""
    double = tree_map(lambda t: t.double(), ARGS)
    return tree_map(lambda t: t.float(), backward(layer("loop"), *double))


@every_backend
@either
def test_backward_and_func_grad(backend: str, recompute: bool, expected: Args) -> None:
    f = layer(backend, recompute)
    same(backward(f, *ARGS), expected)
    same(torch.func.grad(value(f), (0, 1, 2))(*ARGS), expected)
    _, vjp = torch.func.vjp(value(f), *ARGS)
    same(vjp(torch.ones(())), expected)
    with torch.no_grad():  # what the transform wrapped has outlived it, and nobody records
        same(vjp(torch.ones(())), expected)


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
def test_compiled_by_inductor(backend: str, expected: Args) -> None:
    f = layer(backend)
    run = compiled(f, "inductor")
    same(backward(run, *ARGS), expected)
    same(run(*ARGS), f(*ARGS))


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


@every_backend
@either
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, backend: str, recompute: bool, expected: Args) -> None:
    f = layer(backend, recompute)
    names = list(PARAMS)
    flat = lambda x, weights, *values: f(dict(zip(names, values, strict=True)), x, weights)
    run = lambda params, x, w: checkpoint(flat, x, w, *params.values(), use_reentrant=reentrant)
    same(backward(run, *ARGS), expected)


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


@every_backend
@either
def test_vmap_over_everything(backend: str, recompute: bool) -> None:
    """Each member of the batch its own tokens, routing and mask; then its own parameters; then its own gradients."""
    f = layer(backend, recompute)
    xs, weights = torch.stack([X, -2 * X]), torch.stack([ARGS[2], 1 - ARGS[2]])
    indices, masks = torch.stack([ROUTING.indices, (ROUTING.indices + 1) % 5]), torch.stack([ROUTING.mask] * 2)
    masks[1] = ~masks[1]
    each = list(zip(xs, weights, indices, masks, strict=True))
    same(
        torch.vmap(f, (None, 0, 0, 0, 0))(PARAMS, xs, weights, indices, masks),
        torch.stack([f(PARAMS, *a) for a in each]),
    )
    models = {name: torch.stack([p, -p]) for name, p in PARAMS.items()}
    one = lambda i: {name: p[i] for name, p in models.items()}
    same(torch.vmap(f)(models, xs, weights, indices, masks), torch.stack([f(one(i), *each[i]) for i in (0, 1)]))
    grad = torch.func.grad(value(f), (0, 1, 2))
    found = torch.vmap(grad, (None, 0, 0, 0, 0))(PARAMS, xs, weights, indices, masks)
    for i in (0, 1):
        same(tree_map(lambda t, i=i: t[i], found), grad(PARAMS, *each[i]))
    total = lambda *args: torch.vmap(value(f), (None, 0, 0, 0, 0))(*args).sum()
    same(torch.func.grad(total)(PARAMS, xs, weights, indices, masks), tree_map(lambda t: t.sum(0), found[0]))


@every_backend
def test_vmap_of_the_whole_block(backend: str) -> None:
    """The routing depends on the member of the batch."""
    config = MoEConfig(n_routed_experts=5, n_activated_experts=2, dim=6, moe_inter_dim=4)
    params = {f"experts.{name}": p for name, p in draw(config, torch.float32).items()}
    params["gate.weight"] = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    xs = torch.stack([X, -X, X.flip(0)])
    run = lambda x: moe(params, x, config, backend=backend)
    same(torch.vmap(run)(xs), torch.stack([run(x) for x in xs]))


@pytest.mark.parametrize("backend", BACKENDS)
@either
def test_second_derivatives(backend: str, recompute: bool) -> None:
    """grad of grad: the reference's, or an error that says so."""
    second = lambda f: torch.func.grad(
        lambda x: torch.func.grad(lambda x: value(f)(PARAMS, x, ARGS[2]))(x).square().sum()
    )
    if backend not in SECOND:
        with pytest.raises(NotImplementedError, match="derivative of a derivative"):
            second(layer(backend, recompute))(X)
        return
    double = tree_map(lambda t: t.double(), ARGS)
    exact = torch.func.grad(
        lambda x: torch.func.grad(lambda x: value(layer("loop"))(double[0], x, double[2]))(x).square().sum()
    )(double[1])
    same(second(layer(backend, recompute))(X), exact.float(), 2e-5)
    leaf = X.clone().requires_grad_()
    (once,) = torch.autograd.grad(value(layer(backend, recompute))(PARAMS, leaf, ARGS[2]), leaf, create_graph=True)
    same(torch.autograd.grad(once.square().sum(), leaf)[0], exact.float(), 2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on import
@pytest.mark.parametrize("backend", SECOND)
def test_forward_mode(backend: str) -> None:
    f, double = layer(backend), tree_map(lambda t: t.double(), ARGS)
    _, tangent = torch.func.jvp(value(f), double, double)
    grads = backward(f, *double)
    inner = sum((g * t).sum() for g, t in zip(tree_leaves(grads), tree_leaves(double), strict=True))
    torch.testing.assert_close(tangent, inner)
    hessian = torch.func.hessian(lambda x: value(f)(double[0], x, double[2]))(double[1])
    torch.testing.assert_close(hessian.flatten(2).flatten(0, 1), hessian.flatten(2).flatten(0, 1).mT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on import
@pytest.mark.parametrize(
    ("backend", "recompute", "fix"), [("triton", False, "'torch_mm' or 'loop'"), ("loop", True, "")]
)
def test_where_there_is_no_forward_mode_the_backend_is_named(backend: str, recompute: bool, fix: str) -> None:
    f, plain = value(layer(backend, recompute)), {n: p for n, p in PARAMS.items() if "lora" not in n}
    with pytest.raises(NotImplementedError, match=f"{fix}.*{backend}" if fix else "recompute=True") as error:
        torch.func.jvp(lambda x: f(plain, x, ARGS[2]), (X,), (X,))
    assert "torch.func.hessian" in str(error.value)


@pytest.mark.parametrize("backend", SECOND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_operators_pass_opcheck(dtype: torch.dtype, backend: str) -> None:
    import fmoe.backends.products  # noqa: F401

    x, y, w = (torch.randn(s).to(dtype) for s in ((6, 5), (6, 3), (4, 5, 3)))
    offsets = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fmoe.gmm.default, (x, w, offsets, backend))
    torch.library.opcheck(torch.ops.fmoe.gmm.default, (x, w.mT.contiguous().mT, offsets, backend))
    torch.library.opcheck(torch.ops.fmoe.tgmm.default, (x, y, offsets, backend))


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
