"""Products with codes: each kernel's product is its eager twin's, both ways round, and the bits of decoding before."""

import kernel_cases as cases
import pytest
import torch
from fmoe_kernels import products, reference
from fmoe_kernels.programs.codes import Coded
from torch import Tensor

E, M = 3, 40


def coded(kind: str, K: int) -> Coded:
    """Every code and scale there is, of one kind."""
    g = torch.Generator().manual_seed(0)
    code, packed = {"int4": ("int4", 8), "int8": ("int8", 4), "sign": ("signed", 1)}.get(
        kind[:4], ("e2m1", 2) if "fp4" in kind else ("e4m3", 1)
    )
    draw = lambda most, *shape: torch.randint(0, most, shape, generator=g)
    words = draw(127, E, M, K // packed).byte() | draw(2, E, M, K // packed).byte() << 7
    if code in ("int4", "int8"):
        words = draw(2**32, E, M, K // packed).sub(2**31).int()
    side = {"mxfp4": (32, 1), "mxfp8": (32, 1), "nvfp4": (16, 1), "int4": (32, 1), "fp8 blocks": (128, 128)}
    side |= {"fp8 small blocks": (16, 16), "fp8 channel": (0, 1), "fp8 tensor": (0, 0)}
    side |= {"int8": (32, 1), "signed": (0, 1), "nvfp4 late": (16, 1), "int4 points": (16, 1), "int8 points": (32, 1)}
    block = (side | {"signed points": (0, 1)})[kind]
    grid = E, *(-(-n // (b or n)) for n, b in zip((M, K), block[::-1], strict=True))
    scale, second = torch.rand(grid, generator=g) + 0.5, None
    if "mx" in kind:
        scale = draw(8, *grid).add(123).byte()
    if "points" in kind:
        second = draw(2**4 if code == "int4" else 2**8, *grid).byte().to(cases.DEVICE).mT
    if "nvfp4" in kind:
        scale, second = draw(100, *grid).add(8).byte(), (torch.rand(E, 1, M, generator=g) + 0.5).to(cases.DEVICE)
    words, scale = words.to(cases.DEVICE).mT, scale.to(cases.DEVICE).mT  # stored as [E, M, K]
    if "late" in kind:
        second = second[:, :, :1].expand(E, 1, M)
    return Coded(words, scale, second, code, block, late="late" in kind)


def said(w: Coded) -> Tensor:
    return reference.decode(*w[:5], divides=w.divides, late=w.late)


KINDS = ["mxfp4", "nvfp4", "int4", "fp8 blocks", "fp8 small blocks", "mxfp8", "fp8 channel", "fp8 tensor"]
KINDS += ["int8", "signed", "nvfp4 late", "int4 points", "int8 points", "signed points"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_its_twin(kind: str, turned: bool) -> None:
    K = 64
    w = coded(kind, K)._replace(turned=turned)
    exact = said(w).mT if turned else said(w)
    x = torch.randn(21, exact.shape[1], generator=torch.Generator().manual_seed(1)).to(cases.DEVICE)
    offsets = torch.tensor([5, 5, 19], device=x.device).int()
    x[19:] = float("nan")
    found = products.gmm_codes(x, w, offsets)[:19]
    expected = reference.gmm(x[:19].double(), exact.double(), offsets)
    assert found.shape == expected.shape and (found - expected).norm() <= 2e-6 * expected.norm()
    assert torch.equal(found, products.gmm(x, exact, offsets)[:19])


@pytest.mark.parametrize("dtype", [d for d in cases.ALL_DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["mxfp4", "int4", "fp8 blocks"])
def test_what_is_decoded_is_rounded_once_to_the_dtype_of_rows(kind: str, dtype: torch.dtype) -> None:
    w = coded(kind, 64)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(cases.DEVICE, dtype)
    offsets = torch.tensor([3, 3, 9], device=x.device)
    found = products.gmm_codes(x, w, offsets)
    assert found.dtype == dtype and torch.equal(found, products.gmm(x, said(w).to(dtype), offsets))


def test_zero_scales_divisors_and_nan() -> None:
    x, offsets = torch.randn(4, 64, device=cases.DEVICE), torch.tensor([4, 4, 4], device=cases.DEVICE).int()
    w = coded("mxfp4", 64)
    least = w._replace(scale=torch.zeros_like(w.scale))  # 2^-127
    assert torch.equal(products.gmm_codes(x, least, offsets), products.gmm(x, said(least), offsets))
    assert said(least).any()
    bad = w._replace(scale=torch.full_like(w.scale, 255))
    assert products.gmm_codes(x, bad, offsets).isnan().all()
    w = coded("nvfp4", 64)._replace(divides=True)
    assert torch.equal(products.gmm_codes(x, w, offsets), products.gmm(x, said(w), offsets))


def test_what_does_not_fit_is_refused() -> None:
    x, offsets = torch.randn(4, 64, device=cases.DEVICE), torch.tensor([4, 4, 4], device=cases.DEVICE).int()
    w = coded("mxfp4", 64)
    nvfp4, two = coded("nvfp4", 64), torch.ones(E, 1, M, device=x.device)
    for change, text in (
        (dict(code="fp4"), "code is 'fp4', expected one of e4m3, e2m1, int4"),
        (dict(code=None), "code is None"),
        (dict(block=None), "block is None, expected powers of two, or 0"),
        (dict(block=(-2, 1)), "block is"),
        (dict(block=(2.0, 1)), "block is"),
        (dict(block=(32, 1, 1)), "block is"),
        (dict(divides=None), "divides is None, expected True or False"),
        (dict(turned=3), "turned is 3"),
        (dict(words=[1]), "words is of type list"),
        (dict(nvfp4._asdict(), scale=nvfp4.scale.float()), "scale is torch.float32 .* expected uint8"),
        (dict(second=two, block=(32, 2)), "second stands beside blocks"),
        (dict(late=1), "late is 1, expected True or False"),
        (dict(coded("int4 points", 64)._asdict(), second=two), r"second is torch.float32 .* expected uint8"),
        (dict(coded("int4 points", 64)._asdict(), scale=w.scale), r"scale is torch.uint8 .* expected float"),
        (dict(scale=w.scale[:, :1]), r"scale is \[3, 1, 40\], expected \[E a b\] = \[3, 2, 40\]"),
        (dict(words=w.words[:, :16]), r"words is \[3, 16, 40\]"),
        (dict(words=w.words.int()), "words is torch.int32"),
        (dict(block=(24, 1)), "expected powers of two"),
        (dict(second=torch.ones(E, 1, 2, device=x.device)), r"second is \[3, 1, 2\]"),
    ):
        with pytest.raises(ValueError, match=text):
            products.gmm_codes(x, w._replace(**change), offsets)
    for given in (None, two):
        with pytest.raises(ValueError, match="w is of type"):
            products.gmm_codes(x, given, offsets)
    with pytest.raises(ValueError, match="x is of type list"):
        products.gmm_codes(x.tolist(), w, offsets)
    with pytest.raises(ValueError, match=r"\[4, 63\]|\[3, 32, 40\]"):
        products.gmm_codes(x[:, :63].contiguous(), w, offsets)
