"""Raw products against their definition, in every dtype, shape and stride; who is chosen by name; and bad routings."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import draw, near, tokens
from torch import Tensor

from fmoe.backends import BACKENDS, NAMES, find
from fmoe.backends.raw import RAW
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4)
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
each = pytest.mark.parametrize("name", [name for name in RAW if name in BACKENDS])  # tests of kernels have the others
sizes = st.sampled_from([1, 2, 3, 8, 13, 16])


def slices(counts: list[int]) -> list[slice]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in other strides: transposed, every other column of more, or starting off any alignment."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "gaps":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
        wide[..., ::2] = t
        return wide[..., ::2]
    return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape) if how == "shifted" else t


@each
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 7]), min_size=1, max_size=5),
    tail=st.sampled_from([0, 3]),
    K=sizes,
    M=sizes,
    how=st.tuples(*[st.sampled_from(["as is", "transposed", "gaps", "shifted", "expanded"])] * 3),
)
def test_products(
    counts: list[int], tail: int, K: int, M: int, how: tuple[str, ...], dtype: torch.dtype, name: str
) -> None:
    """Empty experts, no rows at all, rows that are nobody's and NaN there, any strides, expanded gradients."""
    E, N = len(counts), sum(counts)
    offsets = torch.tensor(counts).cumsum(0).int()
    generator = torch.Generator().manual_seed(K * 31 + M)
    new = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    x, y, w = new(N + tail, K), new(N + tail, M), new(E, K, M)
    if how[1] == "expanded":
        y = y[:, :1].expand(-1, M) if tail else y[:1, :1].expand(N, M) if N else y
    if tail:
        x[N:] = torch.nan
    xs, ys, ws = (strided(t, h) for t, h in zip((x, y, w), how, strict=True))
    out, dw = RAW[name].gmm(xs, ws, offsets), RAW[name].tgmm(xs, ys, offsets)
    assert out.shape == (N + tail, M) and dw.shape == (E, K, M) and out.dtype == dw.dtype == dtype
    for e, rows in enumerate(slices(counts)):
        near(out[rows], x[rows].double() @ w[e].double(), ROUNDING[dtype])
        near(dw[e], x[rows].double().mT @ y[rows].double(), ROUNDING[dtype])
        assert counts[e] or not dw[e].any()


@each
def test_the_gradient_of_a_bias_is_the_fp64_sum_rounded_once(name: str) -> None:
    """Heavy cancellation: a sum in fp32 is wrong from the first digit on."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(500, 7, generator=generator) * 1e6
    rows = torch.cat([big, -big.flip(0), torch.randn(24, 7, generator=generator) * 1e-3])
    ones, offsets = torch.ones(1024, 1), torch.tensor([0, 1024], dtype=torch.int32)
    assert torch.equal(RAW[name].tgmm(ones, rows, offsets)[1, 0], rows.double().sum(0).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_plain_sum(dtype: torch.dtype, backend: str) -> None:
    """Its gradient is one number, expanded: strides of 0."""
    params = {name: p.requires_grad_() for name, p in draw(CONFIG, dtype).items()}
    x, routing = tokens(CONFIG, dtype=dtype)
    experts(params, x, routing, CONFIG, backend=backend).sum().backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    y = experts(leaves, x, routing, CONFIG, backend=backend)
    y.backward(torch.ones_like(y))
    assert all(torch.equal(leaves[name].grad, p.grad) and p.grad.any() for name, p in params.items())


def test_autocast_does_not_reach_raw_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes them, and in a backward that runs inside autocast too."""
    from fmoe.backends.products import gmm

    class Plain:
        gmm = staticmethod(lambda x, w, offsets: x @ w[0])
        tgmm = staticmethod(lambda x, y, offsets: (x.mT @ y)[None])

    monkeypatch.setitem(RAW, "plain", Plain)
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gmm(x, w, torch.tensor([3]).int(), "plain")
        y.backward(torch.ones_like(y))
    near(y.detach(), x.detach().double() @ w[0].detach().double(), 1e-6)
    near(w.grad[0], x.detach().double().mT @ torch.ones(3, 4).double(), 1e-6)


def test_who_is_chosen() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert find(None, cpu) is BACKENDS["torch_mm"]
    assert all(find(name, gpu) is backend for name, backend in BACKENDS.items())
    assert find(print, cpu) is print
    with pytest.raises(ValueError, match="backend is 'magic', expected one of loop, torch_mm, triton, "):
        find("magic", cpu)
    assert set(NAMES) >= {*BACKENDS, "triton"}


def test_triton_on_a_gpu_and_why_not_where_it_cannot_be() -> None:
    """In a process of its own: with Triton a GPU's default is `fused`; without, its name says why."""
    code = """
import sys, torch
{}
from fmoe.backends import BACKENDS, Fused, find
gpu = torch.device("cuda")
print(isinstance(find(None, gpu), Fused), find(None, gpu) is BACKENDS["torch_mm"])
try: print(isinstance(find("triton", gpu), Fused))
except ImportError as error: print(error)
"""
    run = lambda first: subprocess.run(
        [sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert run("") == ["True False", "True"]
    found = run("import importlib.util as u; u.find_spec = lambda n: None")
    assert found[0] == "False True"
    assert found[1].startswith("backend 'triton' cannot run here: triton is not installed") and "'torch_mm'" in found[1]


def refused(match: str, routing: Any) -> None:
    params, (x, _) = draw(CONFIG), tokens(CONFIG)
    with pytest.raises(ValueError, match=match):
        experts(params, x, routing, CONFIG)


def test_routings_that_are_none() -> None:
    params, (x, r) = draw(CONFIG), tokens(CONFIG)
    assert torch.equal(experts(params, x, (r.indices, r.weights, r.mask), CONFIG), experts(params, x, r, CONFIG))
    bare = Routing(r.indices, r.weights)
    assert torch.equal(experts(params, x, (r.indices, r.weights), CONFIG), experts(params, x, bare, CONFIG))
    refused(r"routing.indices is bool \[9, 3\], expected integer \[T=9, K\]", r._replace(indices=r.indices > 1))
    refused(r"routing is a tuple of 1, expected Routing\(indices, weights, mask\)", (r.indices,))
    refused("routing is a Tensor, expected Routing", r.indices)
    refused("routing is a NoneType, expected Routing", None)
    refused(r"routing.weights is a float, expected a tensor", (r.indices, 1.0))
    refused(r"routing.mask is a list, expected a tensor", (r.indices, r.weights, [True] * 9))
    for dtype in (torch.int32, torch.int16, torch.int8):
        short = r._replace(indices=r.indices.clamp(max=100).to(dtype))
        assert torch.equal(experts(params, x, short, CONFIG), experts(params, x, r, CONFIG))
