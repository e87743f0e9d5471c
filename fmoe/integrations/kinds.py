"""What a module is beneath what has been made of its class, and what a patched one takes along in a pickle."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fmoe.backends import Backend
from fmoe.codecs.stacks import is_code
from fmoe.shapes import check_held


def kind_of(module: nn.Module) -> type:
    """The class whose forward a module's class has: itself, or what a subclass without one was made of.

    `fully_shard` and `parametrize` make such subclasses. One with a forward of its own computes something else.

    >>> kind_of(type("Made", (nn.Linear,), {})(1, 1)), kind_of(nn.Linear(1, 1))
    (<class 'torch.nn.modules.linear.Linear'>, <class 'torch.nn.modules.linear.Linear'>)
    """
    own = (kind for kind in type(module).__mro__ if "forward" in kind.__dict__ and kind is not nn.Module)
    return next(own, type(module))


def held_by(module: nn.Module) -> type:
    """The class of a module whose parameters are read, not its forward called: parametrised ones are read as such."""
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


def present(module: nn.Module, x: Tensor) -> None:
    """Raises ValueError for a tensor of a module that has no data, beside an x that has, and that no hook will bring.

    And for codes, but for those of linear layers, which are called and not read: what a function of the module's own,
    or a norm, reads is not among the parameters that `fmoe.experts` checks.
    """
    every = chain(module.parameters(), module.buffers())
    if torch.compiler.is_compiling() or not any(t.device.type == "meta" or is_code(t) for t in every):
        return
    for name, part, t in _unbrought(module, ""):
        lost = t.device.type == "meta" and x.device.type != "meta"
        if lost or (is_code(t) and isinstance(t, nn.Parameter) and not isinstance(part, nn.Linear)):
            check_held(type(module).__name__, {name: t}, x.device)


def _unbrought(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    for name, t in chain(module._parameters.items(), module._buffers.items()):
        if t is not None:
            yield prefix + name, module, t
    for name, child in module.named_children():
        if "forward" not in child.__dict__ and not child._forward_pre_hooks:  # as accelerate's hooks are set
            yield from _unbrought(child, f"{prefix}{name}.")


class Registered:
    """A name that Transformers knows for fmoe's experts: to unpickle it is to register it, in any process."""

    def __init__(self, name: str, backend: "str | Backend | None") -> None:
        self.name, self.backend = name, backend

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (self.name, self.backend)

    def __deepcopy__(self, memo: Any) -> "Registered":
        return self


def _registered(name: str, backend: "str | Backend | None") -> Registered:
    from fmoe.integrations.transformers import register  # on first use: it needs what stands here

    register(name, backend)
    return Registered(name, backend)
