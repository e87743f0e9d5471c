"""What a product of experts keeps and writes: no copy of a weight, gradients in their parameter's order."""

import gc
import mmap
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fmoe import MoEConfig, Routing, experts
from fmoe.backends import BACKENDS
from fmoe.backends.raw import loop, memory

E, D, I, K = 6, 16, 8, 2
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)
ORDERS = {"native": lambda p: p.contiguous(), "as Hugging Face": lambda p: p.mT.contiguous().mT}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def drawn(order: Any, dtype: torch.dtype, T: int = 7) -> tuple[dict[str, Tensor], Tensor, Routing]:
    made = torch.Generator().manual_seed(0)
    shapes = {"gate_and_up_projs": (E, D, 2 * I), "down_projs": (E, I, D)}
    params = {n: order((0.3 * torch.randn(s, generator=made)).to(dtype)).requires_grad_() for n, s in shapes.items()}
    ids = torch.rand(T, E - 2, generator=made).argsort(-1)[:, :K]  # the last two experts are idle
    x = torch.randn(T, D, generator=made)
    return params, x.to(dtype), Routing(ids, torch.rand(T, K, generator=made))


@every_backend
@every_order
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_gradients_are_kept_as_they_come_in_the_order_of_their_parameter(
    backend: str, order: Any, dtype: torch.dtype, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LARGE", 1)  # in pages of their own
    params, x, routing = drawn(order, dtype, T)
    x.requires_grad_()
    came: dict[str, int] = {}
    for name, p in params.items():
        p.register_hook(lambda g, name=name: came.update({name: g.data_ptr()}))
    y = experts(params, x, routing, CONFIG, backend=backend)
    y.double().square().sum().backward()
    wide = {name: p.detach().double() for name, p in params.items()}
    right = {name: p.requires_grad_() for name, p in (wide | {"x": x.detach().double()}).items()}
    expected = naive.experts({n: right[n] for n in params}, right["x"], routing, CONFIG)
    expected.square().sum().backward()
    tolerance = {2: 3e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    for name, p in (params | {"x": x}).items():
        assert p.grad is not None and p.grad.stride() == p.stride() and p.grad.dtype == dtype
        assert name == "x" or p.grad.data_ptr() == came[name], "autograd has copied it"
        assert float((p.grad - right[name].grad).norm()) <= tolerance * float(right[name].grad.norm()), name
        assert name == "x" or not p.grad[-2:].any()


@every_backend
@every_order
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_a_weight_is_kept_for_backward(backend: str, order: Any, stored: torch.dtype) -> None:
    params, x, routing = drawn(order, stored)
    own = {p.untyped_storage().data_ptr() for p in params.values()}
    kept: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            experts(params, x.to(dtype).requires_grad_(), routing, CONFIG, backend=backend)
    copies = [t.shape for t in kept if t.ndim == 3 and t.untyped_storage().data_ptr() not in own]
    assert not copies and sum(t.untyped_storage().data_ptr() in own for t in kept) == 4


@every_backend
def test_only_experts_with_rows_are_read_and_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, x, routing = drawn(ORDERS["native"], torch.float32, T=1)
    used = routing.indices.flatten().tolist()
    seen: list[int] = []

    mm = torch.mm

    def spy(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
        seen.extend(e for name in params for e in range(E) if w.data_ptr() == params[name][e].data_ptr())
        return mm(x, w, out=out)

    monkeypatch.setattr(loop, "LARGE", 1)  # small ones are one call for all, which takes no rows of the others
    monkeypatch.setattr(torch, "mm", spy)
    with torch.no_grad():
        experts(params, x, routing, CONFIG, backend=backend)
    assert sorted(seen) == sorted(2 * used)


def test_pages_are_zero_private_and_of_the_size_asked_for() -> None:
    like = torch.ones(1, dtype=torch.bfloat16)
    big = memory.zeros((3, 1024, 1024), like)
    assert big.shape == (3, 1024, 1024) and big.dtype == like.dtype and not big.any()
    big[1] = 1
    assert not memory.zeros((3, 1024, 1024), like).any() and big.sum(dtype=torch.float64) == 1024 * 1024
    assert memory.empty((3, 1024, 1024), like).is_contiguous()
    assert memory.zeros((0, 4), like).shape == (0, 4) and memory.empty((2,), like).shape == (2,)


def test_what_a_tensor_gave_back_the_next_one_has_and_zeros_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "POOL", memory.Pool())
    like, shape = torch.ones(1), (4, 1024, 512)
    first = memory.empty(shape, like)
    where = first.fill_(7).data_ptr()
    view = first[1:].mT
    del first
    assert memory.empty(shape, like).data_ptr() != where, "a view still reads it"
    del view
    gc.collect()
    again = memory.partly(shape, like, [1, 0, 1, 0])
    assert again.data_ptr() == where and not again[1].any() and not again[3].any()
    del again
    assert not memory.zeros(shape, like).any() and memory.empty((4, 1024, 420), like).data_ptr() == where
    assert memory.empty((4, 1024, 256), like).data_ptr() != where, "it has twice the size"


def test_what_nobody_uses_the_system_may_take() -> None:
    def offered() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("LazyFree:"))

    before, taken = offered(), memory.empty((2 * memory.LARGE,), torch.ones(1)).fill_(1)
    assert offered() <= before
    del taken
    assert offered() >= before + memory.LARGE


@given(st.lists(st.integers(1, 4) | st.integers(-4, -1), max_size=40))
def test_pages_are_never_shared_and_never_more_than_were_in_use_at_once(steps: list[int]) -> None:
    """n > 0: take n pages; n < 0: give back what was taken -n times ago."""
    pool, out, most = memory.Pool(), list[Any](), 0
    for n in steps:
        if n > 0:
            out.append(pool.take(n * mmap.PAGESIZE))
            assert n * mmap.PAGESIZE <= len(out[-1]) <= 1.25 * n * mmap.PAGESIZE
        elif len(out) >= -n:
            pool.give(out.pop(n))
        most = max(most, sum(map(len, out)))
        mapped = [*out, *pool.idle, *pool._back]
        assert len({*map(id, mapped)}) == len(mapped) and sum(map(len, mapped)) <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_sixteen_bits_are_added_in_fp32_and_rounded_once(dtype: torch.dtype, rows: int) -> None:
    x, w = torch.randn(rows, 256).to(dtype), torch.randn(1, 256, 64).to(dtype)
    for weight in (w, w.mT.contiguous().mT):
        found = loop.gmm(x, weight, torch.tensor([rows]))
        exact = x.double() @ w[0].double()
        ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((found.double() - exact).abs() <= ulp + 1e-4).all()
