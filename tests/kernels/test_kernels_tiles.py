"""Tiles: what a table may hold, and that none of it changes a result."""

import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
import triton
import triton.language as tl
from fmoe_kernels.host.configs import Config
from fmoe_kernels.host.launch import Act, Tiling
from fmoe_kernels.programs.dact import dact
from fmoe_kernels.programs.gmm import gmm
from fmoe_kernels.programs.route import make_route, sorted_route
from fmoe_kernels.programs.scalars import GATED
from fmoe_kernels.tools.tuning import candidates
from triton.tools.tensor_descriptor import TensorDescriptor

DEVICE = kernel_cases.DEVICE
TWICE = {"up": Config(128, 64, 64, 4, 3, 2, ctas=2, tma=True), "dact": Config(128, 128, 64, 4, 3, 4, ctas=2, tma=True)}
FLAT = Config(128, 128, 64, 4, 3, 2, ctas=2, tma=True, flatten=True)


@pytest.mark.parametrize("kernel, tiles", [*TWICE.items(), ("gmm", FLAT), ("gmm", FLAT._replace(flatten=False))])
def test_tiles_of_which_two_fit_are_swept(kernel: str, tiles: Config) -> None:
    assert tiles in candidates(kernel, tma=True)
    assert not any(c.flatten for c in candidates(kernel, tma=False))


def test_a_table_names_its_tiles_apart() -> None:
    for kernel in ("up", "gmm", "dact", "dw"):
        tried = candidates(kernel, tma=True)
        assert len({str(c) for c in tried}) == len(tried)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "geglu", "quick_geglu", "relu2"])
def test_parts_of_a_tile_change_no_bit(name: str, tma: bool) -> None:
    torch.manual_seed(0)
    (T, K, E, D, I), U = (9, 2, 3, 16, 64), 64 * (1 + GATED[name])
    r = make_route(torch.randint(0, E, (T, K), device=DEVICE), None, E)
    new = lambda *shape: torch.randn(shape, dtype=torch.float16, device=DEVICE)
    args = new(T, D), new(E, I, D), new(T * K, U), torch.rand(T * K, device=DEVICE), r, Act(name, 1.5, 2.0)
    tiles = [Config(16, 64, 16, 4, 1, parts, tma=tma) for parts in (1, 2, 4, 8)]
    first, *others = (dact(*args, Tiling(only=c)) for c in tiles)
    for found in others:
        assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[1])
        torch.testing.assert_close(found[2], first[2])  # summed part by part


def test_a_flattened_product_is_the_same() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 24, device=DEVICE), torch.randn(3, 24, 20, device=DEVICE)
    r = sorted_route(x, torch.tensor([17, 17, 40], device=DEVICE))
    plain, flat = (gmm(x, w, None, None, r, Tiling(only=Config(16, 16, 16, 4, 1, flatten=f))) for f in (False, True))
    assert torch.equal(plain, flat)


@triton.jit
def columns(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)


def test_no_axis_of_a_tile_is_other_than_a_power_of_two() -> None:
    """By neither way to memory, so tables hold none: the compiler refuses 192 columns before it looks at a device."""
    with pytest.raises(Exception, match="power of 2"):
        columns[(1,)](torch.zeros(192, device=DEVICE), N=192)
    with pytest.raises(ValueError, match="power of 2"):
        TensorDescriptor.from_tensor(torch.zeros(4, 192, device=DEVICE), [4, 192])
