"""Recomputation: a function whose backward keeps its arguments and nothing of what it computed from them."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fmoe.dispatch.watched import of_members


def recompute(f: Callable[..., Tensor], *args: Any) -> Tensor:
    """f(*args), computed again in backward: only the tensors in args are kept. args: any pytrees.

    Autocast is then what it is in this call, whatever it is around the backward.

    Unlike torch.utils.checkpoint it differentiates under torch.func as well, to any order (but not in forward mode:
    NotImplementedError). Under torch.compile it is torch.utils.checkpoint, since a compiler would find the two
    computations equal and keep the first; and where that cannot be (torch.compile of a torch.func transform, and
    torch.export) it is f(*args), of which the compiler keeps what it likes.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> recompute(lambda x: x.exp().sin(), x).backward()
    >>> torch.equal(x.grad, x.exp() * x.exp().cos())
    True
    """
    if torch.compiler.is_compiling():
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or torch.compiler.is_exporting():
            return f(*args)
        return checkpoint(f, *args, use_reentrant=False)
    leaves, spec = pytree.tree_flatten(args)
    return _Recompute.apply(lambda *leaves: f(*pytree.tree_unflatten(leaves, spec)), *leaves)


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(f: Callable[..., Tensor], *leaves: Any) -> Tensor:
        return f(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.f, *leaves = inputs
        kinds = {"cpu"} | {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} - {"meta"}
        ctx.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        leaves = [next(tensors if tensor else others) for tensor in ctx.is_tensor]
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]

        def of_needed(*values: Tensor) -> Tensor:
            given = dict(zip(needed, values, strict=True))
            return ctx.f(*(given.get(i, leaf) for i, leaf in enumerate(leaves)))

        with ExitStack() as around:
            for kind, dtype, enabled in ctx.autocast:
                around.enter_context(torch.autocast(kind, dtype, enabled))
            vjp = torch.func.vjp(of_needed, *(leaves[i] for i in needed))[1]
            grads = dict(zip(needed, of_members(vjp, dy), strict=True))
        return None, *(grads.get(i) for i in range(len(leaves)))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "recompute=True: forward mode, which torch.func.hessian takes, is not implemented; leave recompute out"
        )


def recomputing() -> bool:
    """Is this a forward that is computed again for a backward, after it had been computed with gradients?

    torch.utils.checkpoint without reentrance does that, in hooks of saved tensors of its own. (With it, the first
    computation has no gradients, and the second is the one that counts.) Inside transforms of torch.func, where nothing
    outside may be written to, the answer is yes.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch._C._current_graph_task_id() != -1 and any(map(_recomputes, _packs()))


def _recomputes(pack: Callable[..., Any]) -> bool:
    """Whether this packs what a checkpoint computes again: PyTorch has no other sign of it than the name."""
    own = getattr(pack, "__module__", None) == checkpoint.__module__
    return own and pack.__qualname__.startswith("_recomputation_hook.")


def _packs() -> list[Callable[..., Any]]:
    """What packs saved tensors here, whoever asked for it: hooks lie in a stack, of which only the top shows."""
    hooks, taken = torch._C._autograd, list[tuple[Any, Any]]()
    while (top := hooks._top_saved_tensors_default_hooks(True)) is not None:
        hooks._pop_saved_tensors_default_hooks()
        taken.append(top)
    for pair in reversed(taken):
        hooks._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in taken]
