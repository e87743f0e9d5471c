"""act(u) * p and its derivatives on plain tensors of which autograd records nothing: swiglu in fewer passes.

Bit for bit what `fmoe.activations` and autograd give.

p is as wide as fp32, or has u's dtype: a product of two numbers of 16 bits is rounded once in either.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe.activations import Apply, activation, halves, swiglu
from fmoe.types import MoEConfig


def weighted(config: MoEConfig) -> Apply:
    """(u, p) -> act(u) * p.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=2, moe_inter_dim=1)
    >>> weighted(config)(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]]))
    tensor([[0.7311]])
    """
    act = activation(config)
    return _swiglu if act is swiglu else act


def derivatives(config: MoEConfig, u: Tensor, p: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h = act(u) * p, and of the sum of h dh the derivatives by u and by p; that by p [N, 1] in fp32 or wider.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=2, moe_inter_dim=1)
    >>> derivatives(config, torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]]), torch.tensor([[1.0]]))
    (tensor([[0.7311]]), tensor([[0.9277, 0.3655]]), tensor([[1.4621]]))
    """
    act, wide = activation(config), torch.promote_types(p.dtype, torch.float32)
    if act is not swiglu:
        with torch.enable_grad():
            u, p = u.detach().requires_grad_(), p.detach().to(wide).requires_grad_()
            h = act(u, p)
        du, dp = torch.autograd.grad(h, (u, p), dh)
        return h.detach(), du, dp
    du = torch.empty_like(u)
    (g, v), (dg, dv) = halves(u), halves(du)
    silu = F.silu(g)
    a, da = silu * v, dh * p if p.dtype == dh.dtype else (dh * p).to(dh.dtype)
    torch.mul(da, silu, out=dv)
    torch.ops.aten.silu_backward.grad_input(da.mul_(v), g, grad_input=dg)
    each = torch.mul(a, dh, out=silu) if wide == a.dtype else a.to(wide) * dh
    return _times(a, p), du, each.sum(-1, keepdim=True)


def _swiglu(u: Tensor, p: Tensor | None) -> Tensor:
    g, v = halves(u)
    h = F.silu(g).mul_(v)
    return h if p is None else _times(h, p)


def _times(h: Tensor, p: Tensor) -> Tensor:
    return h.mul_(p) if p.dtype == h.dtype else (h * p).to(h.dtype)
