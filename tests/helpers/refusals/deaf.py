"""A tensor of a kind that has no operations."""

from typing import Any

from torch import Tensor


class Deaf(Tensor):
    """A tensor that answers operators itself, and none, as quantised ones do of those that they have not."""

    @staticmethod
    def __new__(cls: type, t: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} is not there")
