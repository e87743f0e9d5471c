"""The fused kernels alone, against their eager twins and fp64: up, dact and dw."""

from collections.abc import Iterator, Sequence

import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels import reference
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.dw import dw
from fmoe_kernels.programs.route import make_route
from fmoe_kernels.programs.scalars import GATED, SCALARS
from fmoe_kernels.programs.up import up
from torch import Tensor


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(kernel_cases.DEVICE):
        yield


def example(T: int, K: int, E: int) -> tuple[Tensor, Tensor]:
    """Ids of E experts, -1 and one beyond among them; a mask."""
    return torch.randint(-1, E + 1, (T, K)), torch.rand(T) > 0.3


@pytest.mark.parametrize("dtype", kernel_cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SCALARS)
def test_up_and_dact_are_their_twins(name: str, bias: bool, dtype: torch.dtype) -> None:
    (T, K, E, D, I), act = (20, 3, 4, 24, 18), Act(name, 1.5, 2.0)
    indices, mask = example(T, K, E)
    weights, U = torch.rand(T, K), I * (1 + GATED[name])
    w_up, w_down = torch.randn(E, D, U) / D**0.5, torch.randn(E, I, D) / I**0.5
    b = torch.randn(E, U) if bias else None
    x, dy = torch.randn(T, D), torch.randn(T, D)
    x[~mask], dy[~mask] = float("nan"), float("nan")
    r, twin = make_route(indices, mask, E), reference.route(indices, weights, mask, E)
    n, cast = len(twin.slot_ids), lambda t: None if t is None else t.to(dtype)
    parts = [cast(t) for t in (x, w_up, b, dy, w_down)]
    x, w_up, b, dy, w_down = parts
    wide = [None if t is None else t.double() for t in parts]

    def errors(found: Sequence[Tensor], z: Tensor) -> list[float]:
        exact = (*reference.up(*wide[:3], twin64, K, *act), *reference.dact(*wide[3:], z.double(), twin64, *act))
        return [kernel_cases.error(f, e) for f, e in zip(found, exact, strict=True)]

    twin64 = reference.route(indices, weights.double(), mask, E)
    a, z = up(x, w_up, b, weights.flatten(), r, act, Tiling(), True)
    dz, again, partial = dact(dy, w_down, z, weights.flatten(), r, act, Tiling())
    ours = errors([t[:n] for t in (a, z, dz, again, partial.double().sum(1))], z[:n])
    eager = reference.up(x, w_up, b, twin, K, *act)
    theirs = errors([*eager, *reference.dact(dy, w_down, eager[1], twin, *act)], eager[1])
    eps = torch.finfo(dtype).eps
    assert all(o <= kernel_cases.LUCK[dtype] * t + 0.1 * eps for o, t in zip(ours, theirs, strict=True)), (ours, theirs)
    assert torch.equal(up(x, w_up, b, weights.flatten(), r, act, Tiling(), False)[0][:n], a[:n])


def test_dw_is_its_twin() -> None:
    indices, mask = example(20, 3, 3)
    r, twin = make_route(indices, mask, 5), reference.route(indices, torch.ones(20, 3), mask, 5)
    n = len(twin.slot_ids)
    left, right = torch.full((60, 18), float("nan")), torch.randn(20, 22)
    left[:n], right[~mask] = torch.randn(n, 18), float("nan")
    found = dw(left, right, r, torch.full((5, 18, 22), float("nan")), Tiling())
    torch.testing.assert_close(found, reference.dw(left[:n], right, twin))
    assert torch.equal(found[4], torch.zeros(18, 22))
