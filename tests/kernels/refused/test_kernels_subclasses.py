"""A tensor whose numbers are not in its storage, as a DTensor's, is refused by name by every public kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_calls import CALLS, LAYER
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """Another tensor, under a class that answers operators and has no storage of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        made: Wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(lambda t: getattr(t, "inner", t), args), **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(t: Tensor) -> Tensor:
    return DTensor.from_local(t, init_device_mesh(t.device.type, (1,)), [Replicate()], run_check=False)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "DTensor": distributed,
    "test_kernels_subclasses.Wrapper": Wrapper,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_of_every_kernel_is_plain(name: str, kind: str) -> None:
    function, arguments = CALLS[name]
    for which, t in arguments.items():
        with pytest.raises(ValueError, match=f"^{name}: {which} is a (.*[.])?{kind.split('.')[-1]}, expected"):
            function(**arguments | {which: KINDS[kind](t)})


@pytest.mark.parametrize("name", CALLS)
def test_other_classes_compute_or_are_refused_by_name(name: str) -> None:
    function, arguments = CALLS[name]
    own = type("Own", (Tensor,), {})
    parameter = lambda t: torch.nn.Parameter(t, requires_grad=False)
    wanted = function(**arguments)
    for make in (parameter, lambda t: t.as_subclass(own), AsyncCollectiveTensor):
        for which, t in arguments.items():
            try:
                found = function(**arguments | {which: make(t)})
            except ValueError as error:
                assert make is AsyncCollectiveTensor
                assert f"fmoe_kernels: {which} is of type AsyncCollectiveTensor, whose data is elsewhere" in str(error)
            else:
                torch.testing.assert_close(_tensors(found), _tensors(wanted), equal_nan=True)


def test_what_a_collective_is_still_filling_is_taken_by_the_layer() -> None:
    function, arguments = CALLS["experts"]
    found = function(**arguments | {"x": AsyncCollectiveTensor(LAYER["x"])})
    assert torch.equal(found, function(**arguments))


def _tensors(made: Any) -> list[Tensor]:
    return [torch.as_tensor(t).float() for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
