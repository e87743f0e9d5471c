"""Experts in codes whose names no published experts have: what loading gives them, and the products."""

import pytest
import torch

import fmoe
from fmoe.codecs.formats import FORMATS
from fmoe.types import MoEConfig

E, D, I = 2, 64, 32
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=1, dim=D, moe_inter_dim=I, expert_activation="swiglu")


@pytest.mark.parametrize("fmt", ["mxfp8 .scale", "fp8 qscale"])
@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
def test_rare_codes_give_what_decoding_gives_with_lora_too(fmt, backend):
    f, g = FORMATS[fmt], torch.Generator().manual_seed(0)
    codes, decoded = {}, {}
    for name, shape in (("gate_and_up_projs", (E, 2 * I, D)), ("down_projs", (E, D, I))):
        q, s = f.encode(torch.randn(shape, generator=g) / 8)
        codes |= {name: q.mT, name + f.beside: s if s.ndim == 0 else s.mT}
        decoded[name] = f.decode(q, s, torch.float32).mT
    x, routing = torch.randn(5, D, generator=g), fmoe.Routing(torch.tensor([[0], [1], [0], [0], [1]]), torch.ones(5, 1))
    lora = {n: 0.1 * torch.randn(t.shape, generator=g) for n, t in fmoe.lora.init(decoded, r=2).items()}
    for more in ({}, lora):
        found = fmoe.experts(codes | more, x, routing, CONFIG, backend=backend)
        assert torch.equal(found, fmoe.experts(decoded | more, x, routing, CONFIG, backend=backend)) and found.any()
    assert {n: t.shape for n, t in fmoe.lora.init(codes, r=2).items()} == {n: t.shape for n, t in lora.items()}
