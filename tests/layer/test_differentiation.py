"""Experts under every transform of PyTorch, for every backend: the values and gradients of plain eager backward."""

import pytest
import torch
from naive import draw
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transformed import ARGS, PARAMS, ROUTING, SECOND, Args, X, backward, layer, same, value

from fmoe.backends import BACKENDS
from fmoe.layer.block import moe
from fmoe.types import MoEConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
either = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])


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
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, backend: str, recompute: bool, expected: Args) -> None:
    f = layer(backend, recompute)
    names = list(PARAMS)
    flat = lambda x, weights, *values: f(dict(zip(names, values, strict=True)), x, weights)
    run = lambda params, x, w: checkpoint(flat, x, w, *params.values(), use_reentrant=reentrant)
    same(backward(run, *ARGS), expected)


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
