"""What cases of silent losses share: experts, LoRA matrices, meshes in one process, and what refuses them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fmoe

Tensors = dict[str, Tensor]
CONFIG = dict(num_experts=4, hidden_size=5, moe_intermediate_size=3, num_experts_per_tok=2)
E4M3 = torch.float8_e4m3fn


def into(cases: dict[str, Callable[..., None]]) -> Callable[..., Callable[..., Any]]:
    """A decorator `case(*numbers)` that puts a function into a file's own table of cases."""

    def case(*numbers: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def add(test: Callable[..., None]) -> Callable[..., None]:
            assert not cases.keys() & {*numbers}
            cases.update(dict.fromkeys(numbers, test))
            return test

        return add

    return case


def experts(head: str = "model.layers.0.mlp.experts.", E: int = 4, I: int = 3, D: int = 5) -> Tensors:
    made = torch.Generator().manual_seed(0)
    shape = lambda p: (D, I) if p == "down" else (I, D)
    return {
        f"{head}{e}.{p}_proj.weight": torch.randn(shape(p), generator=made)
        for e in range(E)
        for p in ("gate", "up", "down")
    }


def lora_of(E: int = 4, I: int = 3, D: int = 5, r: int = 2) -> Tensors:
    """The LoRA matrices of one layer, natively."""
    shapes = {"gate_and_up_A": (E, D, r), "gate_and_up_B": (E, r, 2 * I), "down_A": (E, I, r), "down_B": (E, r, D)}
    made = torch.Generator().manual_seed(0)
    head = "base_model.model.model.layers.0.mlp.experts.lora_"
    return {head + n: torch.randn(shape, generator=made) for n, shape in shapes.items()}


@contextmanager
def refused(*keys: str, match: str | None = None) -> Iterator[None]:
    """An AdapterError that names each of the keys; in its text too, where no problems of one kind are one line."""
    with pytest.raises(fmoe.AdapterError, match=match) as error:
        yield
    assert {*keys} <= {*error.value.keys}, str(error.value)
    text = str(error.value)
    assert all(key in text for key in keys) or re.search(r"\(\d+ problems\)", text), text


@contextmanager
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], rank: int = 0) -> Iterator[DeviceMesh]:
    """A mesh in one process: it cannot communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    n = torch.Size(shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def renumbered(tensors: Tensors, numbers: dict[int, int]) -> Tensors:
    """Experts under other numbers."""

    def name(key: str) -> str:
        head, _, tail = key.partition(".experts.")
        e, _, rest = tail.partition(".")
        return f"{head}.experts.{numbers[int(e)]}.{rest}" if tail else key

    return {name(n): t for n, t in tensors.items()}


def stacked(E: int = 4, I: int = 4, D: int = 6) -> Tensors:
    shapes = dict(gate_proj=(E, I, D), up_proj=(E, I, D), down_proj=(E, D, I))
    return {f"model.layers.0.moe.{n}.weight": torch.randn(shape) for n, shape in shapes.items()}
