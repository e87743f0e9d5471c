"""Tensors to be filled that share memory are refused before anything is read; views beside each other are filled."""

from functools import cache

import pytest
import torch
from directories import fill
from torch import Tensor

import fmoe
from fmoe.testing import same

A, B = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cache(lambda: fill(tmp_path_factory.mktemp("source"), "qwen3_moe-float32"))()


@pytest.fixture
def empty(source) -> dict[str, Tensor]:
    return {n: torch.full_like(t, torch.nan) for n, t in fmoe.load(source).items()}


LOADS = {"load": lambda path, out: fmoe.load(path, out=out), "dcp": lambda path, out: fmoe.dcp.load(out, path)}


@pytest.mark.parametrize("load", LOADS)
def test_one_memory_for_two_names_is_refused(load, source, empty):
    stack = next(t for n, t in empty.items() if n.endswith("experts.down_projs"))
    n = len(empty[A])
    for shared in (empty[B], empty[B].view(-1), *(stack.as_strided((n,), (step,), 1) for step in (1, 2))):
        out = empty | {A: shared}
        with pytest.raises(fmoe.AdapterError, match="share memory, expected storage of its own") as error:
            LOADS[load](source, out)
        assert A in error.value.keys
        assert all(t.isnan().all() for t in empty.values()), "something was read"


@pytest.mark.parametrize("load", LOADS)
def test_one_element_in_many_places_is_refused(load, source, empty):
    with pytest.raises(fmoe.AdapterError, match=f"'{A}' is expanded.*clone it") as error:
        LOADS[load](source, empty | {A: torch.zeros(1).expand(empty[A].shape)})
    assert error.value.keys == (A,) and all(t.isnan().all() for t in empty.values())


@pytest.mark.parametrize("load", LOADS)
def test_views_between_each_others_rows_are_filled(load, source, empty):
    one, whole = torch.zeros(sum(t.numel() for t in empty.values())), {}
    for name, part in zip(empty, one.split([t.numel() for t in empty.values()]), strict=True):
        whole[name] = part.view(empty[name].shape)
    both = torch.zeros(len(empty[A]), 2)
    for out in (whole, empty | {A: both[:, 0], B: both[:, 1]}):
        LOADS[load](source, out)
        same(out, fmoe.load(source))
