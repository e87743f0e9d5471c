"""The expert layers of a model: those that it has, those that ran, and how far they are from eager's."""

from typing import Any

from torch import Tensor, nn

from fmoe.integrations import bindings, composed


class Calls:
    """Counts the expert layers that ran, and the experts' parameters that they were given."""

    def __init__(self) -> None:
        self.params: list[dict[str, Tensor]] = []

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.params.append(params)
        return composed.layer(params, *args, **kwargs)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def expert_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if bindings.is_decorated(m)]
