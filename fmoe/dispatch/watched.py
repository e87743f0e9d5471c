"""Whether anybody listens: what nobody hears of may take the short way, which costs a tenth of the long one."""

import torch
from fmoe_kernels.host.batch import of_members, older
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["at_most_recorded", "of_members", "recorded", "untraced", "unwatched"]

PLAIN = (Tensor, nn.Parameter)
wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def unwatched(*tensors: Tensor) -> bool:
    """Are these plain tensors with data, and no autograd of either mode, no transform and no tracer about?

    >>> x = torch.ones(1, requires_grad=True)
    >>> unwatched(x), unwatched(x.detach())
    (False, True)
    """
    return at_most_recorded(*tensors) and not recorded(*tensors)


def recorded(*tensors: Tensor) -> bool:
    """Does autograd record what is made of these?"""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def at_most_recorded(*tensors: Tensor) -> bool:
    """Are these plain tensors with data, and nobody about but autograd in reverse mode?

    A tensor that a transform wrapped has no data of its own, also when the transform is over: what torch.func.vjp
    returns finds such ones among what was saved. Function.apply and operators unwrap them. Nor has a batch of
    gradients, which `of_members` takes apart.
    """
    about = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    if about or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return False
    return all(type(t) in PLAIN and not t.is_meta and not wrapped(t) and not older(t) for t in tensors)


def untraced(owner: str) -> None:
    """Raises ValueError under torch.jit.trace: it writes down what the host reads, one routing, as constants."""
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        told = "called under torch.jit.trace (torch.onnx.export with dynamo=False is one), expected no such tracer"
        why = "it would record this routing as constants, and be wrong for every other input"
        raise ValueError(
            f"{owner}: {told}: {why}. Fix: torch.export.export, torch.onnx.export(dynamo=True), torch.compile"
        )
