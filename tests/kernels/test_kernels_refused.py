"""Kernels say by name that a tensor has no data, that a constant is no number, and what an interpreter gets wrong."""

import os
import subprocess
import sys

import pytest
import torch
from fmoe_kernels import activations, experts, products
from kernel_cases import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode


def test_products_of_what_has_no_data_are_refused():
    x, w, ends = torch.ones(4, 16), torch.ones(2, 16, 16), torch.tensor([2, 4])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, w, ends)]
    for a, b, c in ([t.to("meta") for t in (x, w, ends)], fake):
        for call in (lambda: products.gmm(a, b, c), lambda: products.tgmm(a, a, c)):  # noqa: B023
            with pytest.raises(ValueError, match="fmoe_kernels: x is on meta or fake, which has no data"):
                call()


@pytest.mark.parametrize("name", ["alpha", "limit"])
def test_constants_are_numbers(name):
    T, E, D, I = 2, 2, 16, 8
    given = torch.ones(T, D), torch.zeros(T, 1).long(), torch.ones(T, 1), None
    given = [t if t is None else t.to(DEVICE) for t in (*given, torch.ones(E, D, 2 * I), torch.ones(E, I, D))]
    for bad in ("7", None, True, [1.0]):
        with pytest.raises(ValueError, match=f"experts: {name} is .*, expected a number"):
            experts(*given, **{name: bad})
        with pytest.raises(ValueError, match=f"swiglu_oai: {name} is .*, expected a number"):
            activations.swiglu_oai(torch.ones(2, 4, device=DEVICE), **{name: bad})


@pytest.mark.parametrize("name", ["swiglu", "relu2"])
def test_an_activation_of_no_columns_has_none(name):
    for shape in ((3, 0), (2, 3, 0), (0, 0)):
        assert getattr(activations, name)(torch.ones(shape, device=DEVICE)).shape == shape


# Triton's own interpreter, not mended, takes the bits of bf16 for integers: kernels say so, and compute the rest.
CODE = """
import torch
import fmoe
from fmoe_kernels import products

x, w, ends = torch.randn(4, 16), torch.randn(2, 16, 16), torch.tensor([2, 4])
exact = torch.cat([x[:2] @ w[0], x[2:] @ w[1]])
for dtype in (torch.float32, torch.float16):
    assert (products.gmm(x.to(dtype), w.to(dtype), ends) - exact).abs().max() < 0.1
config = fmoe.MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=16, moe_inter_dim=8)
params = {"gate_and_up_projs": torch.randn(2, 16, 16).bfloat16(), "down_projs": torch.randn(2, 8, 16).bfloat16()}
routing = fmoe.Routing(torch.tensor([[0], [1], [1], [0]]), torch.rand(4, 1), None)
x, w = x.bfloat16(), w.bfloat16()
said = []
for call in (
    lambda: products.gmm(x, w, ends), lambda: products.tgmm(x, x, ends),
    *(lambda by=by: fmoe.experts(params, x, routing, config, backend=by) for by in ("triton", "triton_fp8")),
):
    try:
        said.append(f"no error: {call().shape}")
    except ValueError as error:
        said.append(str(error))
print(*said, sep="\\n")
"""


def test_bf16_is_refused_by_name_in_an_interpreter_that_multiplies_it_wrongly():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert len(said) == 4
    assert all("bfloat16, which Triton's interpreter multiplies wrongly, expected float32" in text for text in said)
