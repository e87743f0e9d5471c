"""Each kernel alone against its eager twin: routing, products, sums, activations; and the tables of tiles."""

import json
from collections.abc import Iterator
from pathlib import Path

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels import products, reference
from fmoe_kernels.host import configs
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Tiling
from fmoe_kernels.programs import activations, sums
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import Route, make_route
from fmoe_kernels.programs.scalars import GATED, SCALARS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(kernel_cases.DEVICE):
        yield


def ends(r: Route) -> Tensor:
    return r.offsets[1:]


def example(T: int, K: int, E: int, seed: int, spread: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(-1, E + spread, (T, K)), torch.rand(T) > 0.3


@settings(max_examples=25)
@given(
    T=st.integers(0, 40), K=st.integers(1, 9), E=st.integers(1, 40), seed=st.integers(0, 99), start=st.integers(0, 3)
)
def test_route_is_its_twin(T: int, K: int, E: int, seed: int, start: int) -> None:
    indices, mask = example(T, K, E, seed, spread=4)
    for m in (None, mask):
        r, twin = make_route(indices, m, E, start), reference.route(indices, torch.ones(T, K), m, E, start)
        n = len(twin.slot_ids)
        assert torch.equal(ends(r), twin.offsets) and r.offsets[0] == 0 and r.offsets.dtype == torch.int32
        assert torch.equal(r.slots[:n].long(), twin.slot_ids)
        inverse = torch.full((T * K,), -1).index_copy(0, twin.slot_ids, torch.arange(n))
        assert torch.equal(r.inverse.long(), inverse)


def test_route_over_many_blocks_and_experts() -> None:
    indices = torch.randint(0, 70, (700, 2), dtype=torch.int32)
    r, twin = make_route(indices, None, 66), reference.route(indices, torch.ones(700, 2), None, 66)
    assert torch.equal(r.slots[: len(twin.slot_ids)].long(), twin.slot_ids) and torch.equal(ends(r), twin.offsets)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_tiles_cover_every_row_once_and_no_tile_straddles_experts(size: int) -> None:
    r = make_route(example(30, 3, 7, 0)[0], None, 7)
    tiles, n = r.tiles(size)
    rows = []
    for e, first in tiles[: int(n)].tolist():
        rows += range(first, min(first + size, int(r.offsets[e + 1])))
        assert r.offsets[e] <= first < r.offsets[e + 1]
    assert rows == list(range(int(r.offsets[-1])))


@pytest.mark.parametrize("order", ["out in", "in out", "neither"])
def test_gmm_and_dw_take_any_strides(order: str) -> None:
    indices, mask = example(20, 3, 4, 0)
    r = make_route(indices, mask, 4)
    n, K, M = int(r.offsets[-1]), 18, 22
    a = torch.full((60, K), float("nan"))
    a[:n] = torch.randn(n, K)
    w = torch.randn(4, 2 * K, 2 * M)
    w = {"out in": w[:, :K, :M].mT.contiguous().mT, "in out": w[:, :K, :M].contiguous(), "neither": w[:, ::2, ::2]}[
        order
    ]
    torch.testing.assert_close(gmm(a, w, None, None, r, Tiling())[:n], reference.gmm(a[:n], w, ends(r)))
    x = torch.randn(20, M)
    x[~mask] = float("nan")
    exact = torch.zeros(4, K, M)
    for e in range(4):
        rows = slice(int(r.offsets[e]), int(r.offsets[e + 1]))
        exact[e] = a[rows].T @ x[r.slots[rows].long() // 3]
    torch.testing.assert_close(dw(a, x, r, torch.empty_like(w), Tiling()), exact)


@pytest.mark.parametrize("K", [1, 5, 18])
def test_products_of_sorted_rows(K: int) -> None:
    ends = torch.tensor([3, 3, 20, 21], dtype=torch.int32)
    x, y, w = torch.randn(25, K), torch.randn(25, 22), torch.randn(4, 22, K).mT
    x[21:], y[21:] = float("nan"), float("nan")
    near = torch.testing.assert_close
    near(products.gmm(x, w, ends)[:21], reference.gmm(x[:21], w, ends))
    exact = [x[a:b].double().T @ y[a:b].double() for a, b in zip([0, 3, 3, 20], ends.tolist(), strict=True)]
    near(products.tgmm(x, y, ends), torch.stack(exact).float())
    near(products.tgmm(x, torch.ones(1, 1).expand(25, 22), ends)[:, :, :1], products.tgmm(x, torch.ones(25, 1), ends))
    assert products.gmm(x[:0], w, ends * 0).shape == (0, 22)
    assert torch.equal(products.tgmm(x[:0], y[:0], ends * 0), torch.zeros(4, K, 22))


def test_bias_gradients_are_fp64_sums() -> None:
    # heavy cancellation: fp32 sums of these would be wrong in the first digit
    r = make_route(torch.arange(400)[:, None] % 3, None, 4)
    y = torch.randn(400, 70) * 1e4
    y[200:] = -y[:200].roll(1, 0)[:200] + torch.randn(200, 70) * 1e-3
    y = y.half().float()
    found = sums.bias_gradient(y, None, r, torch.float32)
    twin = reference.route(torch.arange(400)[:, None] % 3, torch.ones(400, 1), None, 4)
    assert torch.equal(found, reference.bias_gradient(y, twin))
    assert torch.equal(found[3], torch.zeros(70))


def test_combine_is_its_twin_and_reads_nothing_that_was_dropped() -> None:
    indices, mask = example(20, 3, 4, 1)
    r, twin = make_route(indices, mask, 4), reference.route(indices, torch.ones(20, 3), mask, 4)
    rows = torch.full((60, 33), float("nan"))
    rows[: len(twin.slot_ids)] = torch.randn(len(twin.slot_ids), 33)
    weights = torch.rand(60)
    weights[r.inverse < 0] = float("nan")
    n = len(twin.slot_ids)
    assert torch.equal(
        sums.combine(rows, None, r, 20, torch.float32), reference.combine(rows[:n], twin.slot_ids, 20, 3)
    )
    weighted = reference.combine(rows[:n] * weights[twin.slot_ids, None], twin.slot_ids, 20, 3)
    torch.testing.assert_close(sums.combine(rows, weights, r, 20, torch.float32), weighted)


# reference-behaviour, appendix C1: g = [-1, 0.5, 10], v = [2, -9, 0.25], p = 0.5
GOLDEN = [
    ("swiglu", {}, [-0.2689414, -1.4005335, 1.2499433]),
    ("swiglu_clamped", dict(limit=1.0), [-0.1344707, -0.1556148, 0.0913823]),
    ("swiglu_oai", {}, [-0.2313064, -1.0511653, 4.3749707]),
    ("quick_geglu", {}, [-0.2313064, -1.0511653, 4.3749707]),
    ("swiglu_oai", dict(limit=0.0), [-0.2313064, -1.4015537, 6.2499997]),
    ("quick_geglu", dict(limit=0.0), [-0.0771021, 0.0, 0.0]),
    ("geglu", {}, [-0.158808, -1.555713, 1.25]),
    ("relu2", {}, [0.0, 0.125, 50.0, 2.0, 0.0, 0.03125]),
    ("situ", {}, [-0.2048242, -1.2944211, 0.1249943]),
    ("situ", dict(limit=2.0), [-0.1559929, -0.2875781, 0.1243474]),
]


@pytest.mark.parametrize(("name", "options", "expected"), GOLDEN)
def test_activations_golden(name: str, options: dict[str, float], expected: list[float]) -> None:
    u = torch.tensor([[-1, 0.5, 10, 2, -9, 0.25]])
    u = torch.tensor([[-1, 2, 0.5, -9, 10, 0.25]]) if name == "quick_geglu" else u
    found = getattr(activations, name)(u, torch.tensor([[0.5]]), **options)
    torch.testing.assert_close(found, torch.tensor([expected]), atol=2e-6, rtol=2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # sigmoid(-200) is 0 that way
@pytest.mark.parametrize("shape", [(5,), (3, 4), ()], ids=str)
@pytest.mark.parametrize("name", SCALARS)
def test_activations_and_gradients_against_fp64(name: str, shape: tuple[int, ...]) -> None:
    I = 1500 if shape == (5,) else 21  # more columns than one block, or fewer
    u = 3 * torch.randn(*shape, I * (1 + GATED[name]), dtype=torch.float64)
    p, dy = torch.rand(*shape, 1, dtype=torch.float64), torch.randn(*shape, I, dtype=torch.float64)

    def grads(f, dtype):  # type: ignore[no-untyped-def]
        a, b = u.to(dtype).requires_grad_(), p.to(dtype).requires_grad_()
        y = f(a, b)
        return y, *torch.autograd.grad(y, (a, b), dy.to(dtype))

    exact = grads(lambda a, b: reference.activate(a, name, 1.0, 0.0) * b, torch.float64)
    options = dict(limit=0.0) if name in ("swiglu_clamped", "swiglu_oai", "quick_geglu") else {}
    options |= dict(alpha=1.0) if name in ("swiglu_oai", "quick_geglu") else {}
    for found, right in zip(
        grads(lambda a, b: getattr(activations, name)(a, b, **options), torch.float32), exact, strict=True
    ):
        torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)


def test_activations_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="swiglu: u has 5 columns, expected an even number"):
        activations.swiglu(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"geglu: p is \[2, 3\], expected one weight for each row: \[2, 1\]"):
        activations.geglu(torch.ones(2, 6), torch.ones(2, 3))


def test_activations_without_rows() -> None:
    u = torch.ones(0, 6, requires_grad=True)
    y = activations.swiglu(u, torch.ones(0, 1))
    y.sum().backward()
    assert y.shape == (0, 3) and u.grad is not None and u.grad.shape == (0, 6)


def test_nan_passes_through_clamps() -> None:
    for name in SCALARS:
        assert getattr(activations, name)(torch.full((1, 4), float("nan"))).isnan().all(), name


def test_tables_serve_every_architecture_and_bucket() -> None:
    table = configs.load()
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950", "cpu"):
        for kernel in ("up", "gmm", "dact", "dw"):
            assert "large" in table[configs.nearest(arch, table)][kernel]
    assert configs.nearest("sm_120", table) == "sm_80" and configs.nearest("sm_103", table) == "sm_100"
    with pytest.raises(ValueError, match="no tiles for sm_70: the table has sm_90, "):
        configs.nearest("sm_70", table)


def test_tune_writes_a_table_that_experts_reads(tmp_path: Path) -> None:
    tries = [Config(16, 16, 16, 4, 1), Config(16, 32, 16, 4, 1), Config(16, 24, 16, 4, 1)]
    path = tmp_path / "tiles.json"
    sizes = dict(n_tokens=8, dim=16, width=16, n_experts=2, top_k=1, dtype=torch.float32, device=kernel_cases.DEVICE)
    timings = fmoe_kernels.tune(path, **sizes, among=tries)
    assert set(timings) == {"up", "gmm", "dact", "dw"}
    assert "16x24x16 w4 s1 p1" not in timings["up"]  # 24 columns are no tile
    written = json.loads(path.read_text())[configs.architecture(torch.device(kernel_cases.DEVICE))]["up"]["fp32"]
    assert written["columns"] in (16, 32)
    x, w_up, w_down = torch.randn(8, 16), torch.randn(2, 16, 32), torch.randn(2, 16, 16)
    layer = lambda **k: fmoe_kernels.experts(
        x, torch.ones(8, 1, dtype=torch.long), torch.ones(8, 1), None, w_up, w_down, **k
    )
    torch.testing.assert_close(layer(table=str(path)), layer())
