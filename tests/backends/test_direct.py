"""The short ways of a CPU: products of few rows, and a layer that nobody listens to, bit for bit what others hear."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import draw, near, tokens

from fmoe.backends.direct import FEW
from fmoe.backends.raw import loop
from fmoe.layer import experts as layer
from fmoe.layer.experts import experts
from fmoe.types import MoEConfig

CONFIG = MoEConfig(n_routed_experts=5, n_activated_experts=3, dim=16, moe_inter_dim=8, expert_bias=True)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MODES = {"plain": {}, "after": dict(apply_router_weight_after_down=True), "unaligned": dict(dim=6, moe_inter_dim=3)}


@pytest.mark.parametrize("mode", [*MODES.values(), dict(expert_bias=False), dict(n_routed_experts=40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_nobody_listens_to_has_the_same_bits(
    dtype: torch.dtype, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = replace(CONFIG, **mode), list[object]()
    run = layer.direct
    monkeypatch.setattr(layer, "direct", lambda *args: calls.append(y := run(*args)) or y)
    for large in (1, loop.LARGE):
        monkeypatch.setattr(loop, "LARGE", large)
        for T in (1, FEW):
            for turned in (False, True):
                params = {n: p.mT.contiguous().mT if turned else p for n, p in draw(config, dtype).items()}
                x, routing = tokens(config, T=T, dtype=dtype)
                routing = routing._replace(indices=routing.indices % config.n_routed_experts, mask=None)
                with torch.no_grad():
                    alone = experts(params, x, routing, config)
                assert calls.pop() is not None and not calls
                assert torch.equal(alone, experts(params, x.requires_grad_(), routing, config)) and not calls


@pytest.mark.parametrize("why", ["mask", "dropped", "no token"])
def test_what_goes_nowhere_takes_the_long_way(why: str) -> None:
    params, (x, routing) = draw(CONFIG), tokens(CONFIG, T=4)
    routing = routing._replace(indices=routing.indices % CONFIG.n_routed_experts, mask=None)
    whole = experts(params, x, routing, CONFIG)
    if why == "no token":
        assert experts(params, x[:0], type(routing)(*(t[:0] for t in routing[:2])), CONFIG).shape == (0, 16)
        return
    indices = routing.indices.clone()
    indices[1] = -1 if why == "dropped" else indices[1]
    mask = torch.arange(4) != 1 if why == "mask" else None
    y = experts(params, x, routing._replace(indices=indices, mask=mask), CONFIG)
    assert not y[1].any() and torch.allclose(y[[0, 2, 3]], whole[[0, 2, 3]], rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*range(1, 18)])
def test_products_of_few_rows_by_large_matrices(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LARGE", 1)
    made = torch.Generator().manual_seed(n)
    new = lambda *shape: torch.randn(shape, generator=made).to(dtype)
    x, y, w, offsets = new(n + 3, 16), new(n + 3, 24), new(3, 16, 24), torch.tensor([1, 1, n + 1]).int()
    rounding = {8: 1e-14, 4: 1e-6, 2: 8e-3}[dtype.itemsize]
    for weights in (w, w.mT.contiguous().mT):
        out = loop.gmm(x, weights, offsets)[: n + 1]
        near(out, torch.cat([x[:1].double() @ w[0].double(), x[1 : n + 1].double() @ w[2].double()]), rounding)
    dw = loop.tgmm(x, y, offsets)
    near(dw[2], x[1 : n + 1].double().mT @ y[1 : n + 1].double(), rounding)
    near(dw[0], x[:1].double().mT @ y[:1].double(), rounding)
    assert not dw[1].any()
