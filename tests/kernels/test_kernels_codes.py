"""Experts in codes by Triton: the bits of its products on what they say."""

import kernel_cases as cases
import pytest
import torch
from kept import layer, lora, results, tokens

from fmoe.backends.mlp import mlp


@pytest.mark.slow  # the cheap row is in test_kernels_fp8.py
@pytest.mark.parametrize("fmt", ["mxfp4 blocks", "nvfp4", "fp8 side one", "int4 pack"])
def test_triton_decodes_what_it_multiplies(fmt: str) -> None:
    codes, decoded, config = layer(fmt)
    codes, decoded = ({n: t.to(cases.DEVICE) for n, t in p.items()} for p in (codes, decoded))
    x, routing = tokens(config)
    x, routing = x.to(cases.DEVICE), routing._replace(**{n: t.to(cases.DEVICE) for n, t in routing._asdict().items()})
    by_products = lambda params, rows, config: mlp(params, rows, config, by="triton")  # as the backend has LoRA
    tuned = {n: t.to(cases.DEVICE) for n, t in lora(config).items()}
    for more in ({}, tuned):
        expected = results(decoded | more, x, routing, config, backend=by_products)
        found = results(codes | more, x, routing, config, backend="triton")
        assert all(torch.equal(found[n], t) for n, t in expected.items()) and found.keys() == expected.keys()
        near = results(decoded | more, x, routing, config, backend="loop")
        assert all((found[n] - t).norm() <= 1e-5 * t.norm() for n, t in near.items())
