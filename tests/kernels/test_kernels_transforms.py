"""Every derivative that a PyTorch user can ask the kernels for, against the eager twin in fp64."""

from collections.abc import Callable
from functools import partial

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels import reference
from fmoe_kernels.ops.custom import experts_backward, experts_forward
from fmoe_kernels.programs import activations
from fmoe_kernels.programs.activations import act_backward, act_forward
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

DEVICE = kernel_cases.DEVICE
T, D, I, E, K = 7, 16, 16, 4, 2
G = torch.Generator().manual_seed(0)
INDICES = torch.randint(0, E, (T, K), generator=G).to(DEVICE)
draw = lambda *shape: torch.randn(shape, generator=G).to(DEVICE)
ARGS = (draw(T, D), draw(T, K), draw(E, 2 * I, D).mT, draw(E, I, D), draw(E, 2 * I), draw(E, D))
ALL = tuple(range(6))
# inductor's own imports
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
LAYERS = pytest.mark.parametrize("recompute", [False, True])


def layer(
    x: Tensor, w: Tensor, *p: Tensor, by: Callable[..., Tensor] = fmoe_kernels.experts, **options: bool
) -> Tensor:
    up, down, b_up, b_down = p
    return by(x, INDICES, w, None, up, down, b_up, b_down, activation="swiglu", **options)


def loss(*args: Tensor, **options: bool) -> Tensor:
    return layer(*args, **options).square().sum()


EXACT = grad(partial(loss, by=reference.experts), argnums=ALL)(*(a.double() for a in ARGS))


def near(found: tuple[Tensor, ...], exact: tuple[Tensor, ...] = EXACT) -> None:
    for f, e in zip(found, exact, strict=True):
        assert f is not None and (f.double() - e).norm() <= 1e-6 * e.norm()


def backward(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    args = [a.clone(memory_format=torch.preserve_format).requires_grad_() for a in ARGS]
    f(*args).backward()
    return tuple(a.grad for a in args)  # type: ignore[return-value, misc]


@LAYERS
def test_backward_and_grad(recompute: bool) -> None:
    f = partial(loss, recompute=recompute)
    near(backward(f))
    near(grad(f, argnums=ALL)(*ARGS))


def test_gradients_are_strided_as_their_weights() -> None:
    for g, a in zip(backward(loss)[2:4], ARGS[2:4], strict=True):
        assert g.stride() == a.stride()


def test_expanded_gradient() -> None:
    args = [a.clone().requires_grad_() for a in ARGS]
    layer(*args).sum().backward()  # its gradient has strides 0
    exact = grad(lambda *a: layer(*a, by=reference.experts).sum(), argnums=ALL)(*(a.double() for a in ARGS))
    near(tuple(a.grad for a in args), exact)  # type: ignore[arg-type, misc]


def test_vmap_of_values_and_of_gradients() -> None:
    x2 = torch.stack([ARGS[0], 2 * ARGS[0]])
    both = vmap(layer, in_dims=(0, *[None] * 5))(x2, *ARGS[1:])
    assert torch.equal(both, torch.stack([layer(x, *ARGS[1:]) for x in x2]))
    stacked = [torch.stack([2 * a, a], 1) for a in ARGS]
    near(tuple(g[1] for g in vmap(grad(loss, argnums=ALL), in_dims=1)(*stacked)))


@LAYERS
def test_a_batch_of_gradients_is_a_loop_over_it(recompute: bool) -> None:
    args = [a.clone(memory_format=torch.preserve_format).requires_grad_() for a in ARGS]
    y = layer(*args, recompute=recompute)
    batch = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    one = [torch.autograd.grad(y, args, g, retain_graph=True) for g in batch]
    found = torch.autograd.grad(y, args, batch, is_grads_batched=True)
    near(found, tuple(torch.stack(g).double() for g in zip(*one, strict=True)))


def test_jacobian() -> None:
    def one(x: Tensor, by: Callable[..., Tensor]) -> Tensor:
        params = [p.to(x.dtype) for p in ARGS[1:4]]
        return by(x[None], INDICES[:1], params[0][:1], None, *params[1:])[0]

    x = ARGS[0][0]
    near((jacrev(one)(x, fmoe_kernels.experts),), (jacrev(one)(x.double(), reference.experts),))


def test_derivative_of_a_derivative_says_that_it_is_not_there() -> None:
    with pytest.raises(NotImplementedError, match="the derivative of a derivative is not implemented by the kernels"):
        grad(lambda x: grad(loss)(x, *ARGS[1:]).sum())(ARGS[0])


@LAYERS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, recompute: bool) -> None:
    f = partial(loss, recompute=recompute)
    near(backward(torch.compile(f, fullgraph=True, backend=backend)))
    near(torch.compile(grad(f, argnums=ALL), fullgraph=True, backend=backend)(*ARGS))


def test_compile_with_any_number_of_tokens() -> None:
    def f(x: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        return fmoe_kernels.experts(x, indices, w, None, *ARGS[2:4])

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for n in (7, 5, 3):
        args = ARGS[0][:n], INDICES[:n], ARGS[1][:n]
        assert torch.equal(compiled(*args), f(*args))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    near(backward(lambda *a: checkpoint(loss, *a, use_reentrant=reentrant)))


def test_selective_checkpoint_by_name() -> None:
    calls = []

    def policy(context, op, *args, **kwargs):  # type: ignore[no-untyped-def]
        if op is not torch.ops.fmoe_kernels.experts_forward.default:
            return CheckpointPolicy.PREFER_RECOMPUTE
        calls.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    near(backward(lambda *a: checkpoint(loss, *a, use_reentrant=False, context_fn=contexts)))
    assert calls[0] is False and len(calls) <= 2


def test_export() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Parameter(ARGS[2]), torch.nn.Parameter(ARGS[3])

        def forward(self, x: Tensor, indices: Tensor, w: Tensor) -> Tensor:
            return fmoe_kernels.experts(x, indices, w, None, self.up, self.down)

    module, args = Layer(), (ARGS[0], INDICES, ARGS[1])
    tokens = {0: torch.export.Dim("T")}
    program = torch.export.export(module, args, dynamic_shapes=(tokens, tokens, tokens))
    shorter = tuple(a[:3] for a in args)
    assert torch.equal(program.module()(*shorter), module(*shorter))


def test_autocast_is_a_cast_of_what_is_multiplied() -> None:
    with torch.autocast(DEVICE, torch.float16):
        y = layer(*ARGS)
    halves = [a.half() for a in ARGS]
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(halves[0], ARGS[1], *halves[2:], wide=True))


def test_operators_keep_their_contracts() -> None:
    forward = (ARGS[0], INDICES, ARGS[1], None, *ARGS[2:], "swiglu", 1.0, 7.0, False, 0, True, False, False, "")
    torch.library.opcheck(experts_forward, forward)
    dy, z, *ints = experts_forward(*forward)
    options = ("swiglu", 1.0, 7.0, False, "")
    for needs in ([True] * 6, [True, False, False, True, False, False]):
        torch.library.opcheck(experts_backward, (dy, ARGS[0], z, *ints, *ARGS[1:], *options, needs))
    u, p = draw(3, 8), draw(3)
    torch.library.opcheck(act_forward, (u, p, "swiglu", 1.0, 7.0))
    for weight in (p, None):
        torch.library.opcheck(act_backward, (draw(3, 4), u, weight, "swiglu", 1.0, 7.0))


def test_activations_under_every_transform() -> None:
    u, p = draw(3, 8), draw(3, 1)
    f = lambda u, p: activations.geglu(u, p).square().sum()
    exact = grad(lambda u, p: (reference.activate(u, "geglu") * p).square().sum(), argnums=(0, 1))(
        u.double(), p.double()
    )
    near(grad(f, argnums=(0, 1))(u, p), exact)
    near(torch.compile(grad(f, argnums=(0, 1)), fullgraph=True, backend="aot_eager")(u, p), exact)
    batched = vmap(grad(f, argnums=(0, 1)))(torch.stack([2 * u, u]), torch.stack([p, p]))
    near(tuple(g[1] for g in batched), exact)
    with pytest.raises(NotImplementedError, match="reference.activate"):
        grad(lambda u: grad(f)(u, p).sum())(u)
