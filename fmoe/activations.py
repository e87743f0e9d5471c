"""Expert activations by name: (u [.., U], p) -> act(u) * p in u's dtype, with p the routing weight.

`gated` activations take U = 2I columns, gate and up side by side (g i) or, `interleaved`, in pairs (i g); the others
take U = I. p broadcasts to [.., I], such as [N, 1]; None stands for ones. The product with p is taken in the wider of
the two dtypes and rounded once. Plain torch operations, so all of it differentiates, twice, and batches under vmap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fmoe.entrance import held
from fmoe.folding import meant
from fmoe.types import MoEConfig

Apply = Callable[[Tensor, Tensor | None], Tensor]


def swiglu(u: Tensor, p: Tensor | None = None) -> Tensor:
    """silu(g) * v * p with u = [g, v], computed in u's dtype.

    >>> swiglu(torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]]), torch.tensor(0.5))
    tensor([[-0.2689, -1.4005,  1.2499]])
    """
    g, v = halves(u)
    return _weighted(F.silu(g) * v, p, u)


def swiglu_clamped(u: Tensor, p: Tensor | None = None, limit: float = 7.0) -> Tensor:
    """silu(min(g, limit)) * clip(v, -limit, limit) * p with u = [g, v], computed in fp32 (fp64 stays).

    >>> swiglu_clamped(torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]]), torch.tensor(0.5), limit=1)
    tensor([[-0.1345, -0.1556,  0.0914]])
    """
    g, v = _clip(*halves(_widen(u)), limit)
    return _weighted(F.silu(g) * v, p, u)


def swiglu_oai(u: Tensor, p: Tensor | None = None, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """g * sigmoid(alpha * g) * (v + 1) * p with u = [g, v], computed in fp32 (fp64 stays).

    limit > 0 first clips g to at most limit and v to [-limit, limit]; otherwise nothing is clipped.

    >>> swiglu_oai(torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]]), torch.tensor(0.5))
    tensor([[-0.2313, -1.0512,  4.3750]])
    """
    g, v = halves(_widen(u))
    if limit > 0:
        g, v = _clip(g, v, limit)
    return _weighted(g * torch.sigmoid(_real(alpha) * g) * (v + 1), p, u)


def quick_geglu(
    u: Tensor, p: Tensor | None = None, alpha: float = 1.702, limit: float = 7.0, linear_offset: float = 1.0
) -> Tensor:
    """g * sigmoid(alpha * g) * (v + linear_offset) * p with u = [g0, v0, g1, v1, ..], computed in u's dtype.

    g is first clipped to at most limit and v to [-limit, limit], whatever the sign of limit.

    >>> quick_geglu(torch.tensor([[-1, 2, 0.5, -9, 10, 0.25]]), torch.tensor(0.5))
    tensor([[-0.2313, -1.0512,  4.3750]])
    """
    g, v = _clip(*pairs(u), limit)
    return _weighted(g * torch.sigmoid(_real(alpha) * g) * (v + _real(linear_offset)), p, u)


def geglu(u: Tensor, p: Tensor | None = None) -> Tensor:
    """gelu(g) * v * p with u = [g, v] and gelu's tanh form, computed in u's dtype.

    >>> geglu(torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]]), torch.tensor(0.5))
    tensor([[-0.1588, -1.5557,  1.2500]])
    """
    g, v = halves(u)
    return _weighted(F.gelu(g, approximate="tanh") * v, p, u)


def situ(u: Tensor, p: Tensor | None = None, beta: float = 1.0, linear_beta: float = 0.0) -> Tensor:
    """beta * tanh(g / beta) * sigmoid(g) * c(v) * p with u = [g, v], computed in fp32 (fp64 stays).

    c(v) = linear_beta * tanh(v / linear_beta), or v itself where linear_beta is not above 0: Kimi-K3's SiTU, and what
    Inkling-2 calls soft caps.

    >>> situ(torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]]), torch.tensor(0.5))
    tensor([[-0.2048, -1.2944,  0.1250]])
    """
    beta, linear_beta = _real(beta), _real(linear_beta)
    g, v = halves(_widen(u))
    if linear_beta > 0:
        v = linear_beta * torch.tanh(v / linear_beta)
    return _weighted(beta * torch.tanh(g / beta) * torch.sigmoid(g) * v, p, u)


def relu2(u: Tensor, p: Tensor | None = None) -> Tensor:
    """max(u, 0)^2 * p, computed in u's dtype; not gated.

    >>> relu2(torch.tensor([[-1, 0.5, 10]]), torch.tensor(0.5))
    tensor([[ 0.0000,  0.1250, 50.0000]])
    """
    return _weighted(F.relu(u).square(), p, u)


def halves(u: Tensor) -> tuple[Tensor, Tensor]:
    """(g, v) of u [.., (g i)]. Raises ValueError for an odd number of columns.

    >>> halves(torch.arange(4))
    (tensor([0, 1]), tensor([2, 3]))
    """
    heard = u.requires_grad or torch._C._are_functorch_transforms_active()  # in a vmap no tensor says so
    heard = heard and forward_ad._current_level < 0  # a tangent that is batched is no view, as a view's must be
    if heard and not torch.compiler.is_compiling():
        gate, up = _Halves.apply(_even(u))
    else:
        gate, up = _even(u).chunk(2, -1)
    return gate, up


class _Halves(torch.autograd.Function):
    """chunk, whose gradients are put side by side without autocast.

    torch.cat takes no fp16 in an autocast to bf16, nor the other way round, and a backward may stand in any.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> tuple[Tensor, ...]:
        return u.chunk(2, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        with torch.autocast("cpu" if grads[0].is_meta else grads[0].device.type, enabled=False):
            return torch.cat(grads, -1)

    @staticmethod
    def jvp(ctx: Any, du: Tensor) -> tuple[Tensor, ...]:
        return du.chunk(2, -1)


def pairs(u: Tensor) -> tuple[Tensor, Tensor]:
    """(g, v) of u [.., (i g)]. Raises ValueError for an odd number of columns.

    >>> pairs(torch.arange(4))
    (tensor([0, 2]), tensor([1, 3]))
    """
    return _even(u)[..., ::2], u[..., 1::2]


class Activation(NamedTuple):
    """One entry of `ACTIVATIONS`: is U = 2I, do gate and up columns alternate, and what a config makes of it."""

    gated: bool
    interleaved: bool
    bind: Callable[[MoEConfig], Apply]


def _swiglu(config: MoEConfig) -> Apply:
    return partial(swiglu_clamped, limit=config.swiglu_limit) if config.swiglu_limit > 0 else swiglu


def _with_limits(f: Callable[..., Tensor]) -> Callable[[MoEConfig], Apply]:
    return lambda config: partial(f, alpha=config.activation_alpha, limit=config.activation_limit)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(True, False, _swiglu),
    "swigluoai": Activation(True, False, _with_limits(swiglu_oai)),
    "quick_geglu": Activation(True, True, _with_limits(quick_geglu)),
    "geglu": Activation(True, False, lambda config: geglu),
    "relu2": Activation(False, False, lambda config: relu2),
    "situ": Activation(
        True, False, lambda config: partial(situ, beta=config.activation_alpha, linear_beta=config.activation_limit)
    ),
}


def activation(config: MoEConfig) -> Apply:
    """(u, p) -> act(u) * p, with config.expert_activation and its limits.

    Raises ValueError for an unknown name.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, swiglu_limit=1.0)
    >>> activation(config)(torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]]), torch.tensor(0.5))
    tensor([[-0.1345, -0.1556,  0.0914]])
    """
    return _entry(config.expert_activation).bind(config)


def is_gated_activation(name: str) -> bool:
    """Is U = 2I? Raises ValueError for an unknown name.

    >>> is_gated_activation("swiglu"), is_gated_activation("relu2")
    (True, False)
    """
    return _entry(name).gated


def is_interleaved(name: str) -> bool:
    """Do gate and up columns alternate? Raises ValueError for an unknown name.

    >>> is_interleaved("quick_geglu"), is_interleaved("swiglu")
    (True, False)
    """
    return _entry(name).interleaved


def _entry(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"expert activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}{meant(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _weighted(a: Tensor, p: Tensor | None, u: Tensor) -> Tensor:
    a = a if p is None else a * p
    return a if a.dtype == u.dtype else a.to(u.dtype)


def _clip(g: Tensor, v: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    limit = _real(limit)
    return g.clamp(max=limit), v.clamp(-limit, limit)


def _real(number: float) -> float:
    """As torch takes it, which knows no int beyond 64 bits."""
    return float(number) if type(number) is int else number


def _widen(u: Tensor) -> Tensor:
    return u.to(torch.promote_types(u.dtype, torch.float32))


def _even(u: Tensor) -> Tensor:
    if u.shape[-1] % 2:
        raise ValueError(f"u has {u.shape[-1]} columns, expected an even number: a gated activation takes gate and up")
    return u


held(globals(), late="*", error=ValueError)
