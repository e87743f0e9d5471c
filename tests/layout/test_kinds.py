"""Tensors of other kinds go through adapters if their operations take them there, and are refused by name if not."""

from typing import Any

import pytest
import torch
from deaf import Deaf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fmoe
from fmoe import AdapterError, TensorSpec

ADAPTER = fmoe.rule("w.{e} [a b]", "w [e a b]") | fmoe.keep("{rest}")
HF = {"w.0": torch.randn(2, 3), "w.1": torch.randn(2, 3)}


class Mute(Tensor):
    """A tensor that leaves every function to others."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {}) if "get" in str(func) else NotImplemented


def int8(t: Tensor) -> Tensor:
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(t.shape[1], t.shape[0], bias=False)
    with torch.no_grad():
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear.weight


KINDS = {"Deaf": Deaf, "Mute": lambda t: t.as_subclass(Mute), "Int8Tensor": int8}


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_not_the_operation_is_refused_by_name_and_may_be_kept(kind):
    odd = {n: KINDS[kind](t) for n, t in HF.items()}
    for call in (ADAPTER.from_hf, lambda given: list(ADAPTER.inverse.iter_hf(given))):
        with pytest.raises(AdapterError, match=f"{kind} cannot be moved .*dequantise") as error:
            call(odd | {"x": torch.ones(2)})
        assert error.value.keys == ("w.0", "w.1")
    assert ADAPTER.from_hf({"x": odd["w.0"]})["x"] is odd["w.0"]


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_codes_with_a_scale_of_their_own_are_refused_by_name():
    codes = {n: torch.quantize_per_tensor(t, 0.1 * (i + 1), 0, torch.qint8) for i, (n, t) in enumerate(HF.items())}
    stack = torch.quantize_per_tensor(torch.randn(2, 2, 3), 0.1, 0, torch.quint8)
    specs = {n: TensorSpec((2, 3), torch.qint8) for n in HF}
    calls = [lambda: ADAPTER.from_hf(codes), lambda: ADAPTER.plan(codes), lambda: ADAPTER.plan(specs)]
    for call in (*calls, lambda: ADAPTER.to_hf({"w": stack}), lambda: ADAPTER.views({"w": stack})):
        with pytest.raises(AdapterError, match=r"of torch.qu?int8, which has a scale.*dequantize\(\) it") as error:
            call()
        assert error.value.keys in (("w",), ("w.0", "w.1"))


def test_other_kinds_that_have_the_operations_go_through():
    want = torch.stack([*HF.values()])
    assert torch.equal(ADAPTER.from_hf({n: torch.nn.Parameter(t) for n, t in HF.items()})["w"], want)
    assert torch.equal(
        torch.func.vmap(lambda hf: ADAPTER.from_hf(hf)["w"])({n: t[None] for n, t in HF.items()})[0], want
    )
    grads = torch.func.grad(lambda hf: ADAPTER.from_hf(hf)["w"].sum())(HF)
    assert all(torch.equal(g, torch.ones(2, 3)) for g in grads.values())
    assert ADAPTER.from_hf({n: t.to("meta") for n, t in HF.items()})["w"].shape == want.shape
    with FakeTensorMode() as mode:
        assert ADAPTER.from_hf({n: mode.from_tensor(t) for n, t in HF.items()})["w"].shape == want.shape
