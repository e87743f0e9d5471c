"""An autograd.Function that is applied in fewer steps where no transform of torch.func is about."""

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers

from fmoe_kernels.host.batch import of_members


class Function(torch.autograd.Function):
    """torch.autograd.Function for a forward without default arguments.

    torch looks for defaults at every `apply`, by `inspect.signature`, which costs as much as a small product.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """forward(*args), recorded."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        plain: Any = super(torch.autograd.Function, cls)
        return of_members(plain.apply, *unwrap_dead_wrappers(args))
