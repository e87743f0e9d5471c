"""What GPUs do and interpreters do not: programs in any order, side by side, with pointers that nobody watches."""

from pathlib import Path

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
import triton
import triton.language as tl
from fmoe_kernels import products
from fmoe_kernels.programs import activations, fp8
from fmoe_kernels.programs.codes import Coded
from fmoe_kernels.programs.route import make_route
from interpreted import watched
from kernel_cases import Case, run
from torch import Tensor

pytestmark = pytest.mark.skipif(kernel_cases.DEVICE != "cpu", reason="it is the interpreter that is watched")

LAYERS = {
    "biases": (Case(bias=True, D=24, I=16), {}),
    "descriptors": (Case(bias=True, D=24, I=16), dict(tma=True, parts=2)),
    "interleaved, odd": (Case(activation="quick_geglu", bias=True, after=True, D=17, I=9), {}),
}


def results(name: str, tmp_path: Path) -> list[Tensor]:
    case, tiles = LAYERS[name]
    table = kernel_cases.table(tmp_path, **tiles) if tiles else ""
    return list(run(fmoe_kernels.experts, case, torch.float16, table=table).values())


def others() -> list[Tensor]:
    """Routing over many blocks and experts, products by hostile offsets, FP8 and activations."""
    torch.manual_seed(0)
    indices = torch.randint(-1, 42, (300, 2))
    r = make_route(indices, torch.rand(300) > 0.2, 40)
    tiles, n = r.tiles(16)
    rows = int(r.offsets[-1])
    x, w, u = torch.randn(9, 20), torch.randn(3, 20, 10), torch.randn(5, 12)
    ends = torch.tensor([4, 2, 10**6])
    scales = dict(w_scale=torch.rand(3, 1, 1), offsets=ends)
    words, sizes = torch.randint(0, 255, (3, 10, 10), dtype=torch.uint8).mT, torch.full((3, 10, 1), 125).byte().mT
    coded = Coded(words, sizes, None, "e2m1", (32, 1))
    return [
        *(r.slots[:rows], r.tokens[:rows], r.inverse, r.offsets, tiles[: int(n)], n),
        products.gmm(x, w, ends),
        products.tgmm(x, torch.randn(9, 6), ends),
        products.gmm_codes(x, coded, ends),
        products.gmm_codes(x[:, :10], coded._replace(turned=True), ends),
        fp8.gmm(x, w.to(fp8.E4M3), **scales),
        activations.geglu(u, torch.rand(5, 1)),
    ]


CALLS = {name: lambda path, name=name: results(name, path) for name in LAYERS} | {"others": lambda path: others()}


@pytest.mark.parametrize("name", CALLS)
def test_no_order_of_programs_changes_a_bit_and_no_two_meet(name: str, tmp_path: Path) -> None:
    with watched() as seen:
        expected = CALLS[name](tmp_path)
    assert seen.launches > 5 and seen.stores > 1000
    assert not seen.races and not seen.outside, (seen.races, seen.outside)
    for order in ("reversed", "shuffled"):
        with watched(order, trace=False) as again:
            found = CALLS[name](tmp_path)
        assert again.launches == seen.launches
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), order


@triton.jit
def add_to_one(x):
    tl.store(x, tl.load(x) + tl.program_id(0))


@triton.jit
def read_the_next(x, y):
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i + 1) + tl.load(y))


@triton.jit
def count_up(x, y):
    tl.store(y + tl.program_id(0), tl.load(x))
    tl.store(x, tl.program_id(0))


@pytest.mark.parametrize(
    "kernel", [add_to_one, read_the_next, count_up], ids=["add_to_one", "read_the_next", "count_up"]
)
def test_planted_faults_are_found(kernel: triton.JITFunction) -> None:
    x, y = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with watched() as seen:
        kernel[(3,)](*(x, y)[: 1 + (kernel is not add_to_one)])
    assert seen.races and not seen.outside
    with watched() as seen:
        read_the_next[(4,)](x, y)
    assert seen.outside == ["read_the_next: 1 addresses"]


def test_another_order_is_another_order() -> None:
    found = {}
    for order in ("forward", "reversed", "shuffled"):
        x, y = torch.zeros(1, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
        with watched(order):
            count_up[(7,)](x, y)
        found[order] = y.tolist()
    assert found["forward"] == [0, 0, 1, 2, 3, 4, 5] and found["reversed"] == [1, 2, 3, 4, 5, 6, 0]
    assert found["shuffled"] not in (found["forward"], found["reversed"])


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.float16])
def test_bf16_is_cast_and_multiplied_as_devices_do(to: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(16, 16).bfloat16(), torch.randn(1, 16, 16).bfloat16()
    exact = x.double() @ w[0].double()
    found = products.gmm(x, w, torch.tensor([16]))
    assert torch.equal(found, exact.float().bfloat16()) or (found.double() - exact).norm() < 2e-3 * exact.norm()
    y = torch.randn(4, dtype=torch.float32)
    y[0] = float("nan")
    back = torch.empty(4, dtype=torch.bfloat16)
    copy[(1,)](y, back)
    assert torch.equal(back.view(torch.int16)[1:], y.bfloat16().view(torch.int16)[1:]) and back[0].isnan()
    out = torch.empty(4, dtype=to)
    copy[(1,)](back, out)
    assert torch.equal(out[1:], back[1:].to(to)) and out[0].isnan()


@triton.jit
def copy(x, y):
    i = tl.arange(0, 4)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def test_shapes_that_are_made_once_are_those_that_triton_makes() -> None:
    for _ in range(2):
        for shape in ([4, 2], [tl.constexpr(4), tl.constexpr(2)], tl.tuple([4, 2])):
            block = tl.block_type(tl.float16, shape)
            assert (list(block.shape), block.numel, block.scalar) == ([4, 2], 8, tl.float16)
            assert str(block) == f"<{tl.tuple([4, 2])}, fp16>" and block != tl.block_type(tl.float32, shape)
            value = tl.tensor(None, block)
            assert ([n.value for n in value.shape], value.numel.value, value.dtype) == ([4, 2], 8, tl.float16)
        assert (list(tl.tensor(None, tl.int32).shape), tl.tensor(None, tl.int32).numel.value) == ([], 1)
        for wrong, error in (([4.0, 2], TypeError), ([4, 3], ValueError), ([], TypeError), ([1 << 21], ValueError)):
            with pytest.raises(error):
                tl.block_type(tl.float16, wrong)
