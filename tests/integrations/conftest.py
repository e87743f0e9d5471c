"""What tests of integrations watch."""

from collections.abc import Iterator
from typing import Any

import pytest
from eager_parity import Calls
from torch import Tensor, nn

from fmoe.integrations import bindings


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    spy = Calls()
    monkeypatch.setattr(bindings, "layer", spy)
    yield spy


@pytest.fixture
def deltas(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters that PEFT has replaced by W + BA, for a forward or for good."""
    from peft.tuners.lora.layer import ParamWrapper

    made: list[str] = []
    parametrize, merge = nn.utils.parametrize.register_parametrization, ParamWrapper.get_delta_weight

    def replaced(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> nn.Module:
        made.append(name)
        return parametrize(module, name, *args, **kwargs)

    def added(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        made.append(self.parameter_name)
        return merge(self, *args, **kwargs)

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", replaced)
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", added)
    return made
