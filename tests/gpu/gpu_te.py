"""L3: the backend `te` with Transformer Engine itself, on a GPU: `python -m pytest tests/gpu/gpu_te.py`. Never run yet.

Not collected by default, so that no skip looks like a test. y and gradients against `loop` on the same GPU.
"""

from functools import partial
from typing import Any

import naive
import pytest
import torch
from torch import Tensor

from fmoe import MoEConfig, Routing, experts
from fmoe.backends import te

CONFIG = MoEConfig(n_routed_experts=8, n_activated_experts=2, dim=256, moe_inter_dim=128, expert_bias=True)
BOUNDS = {None: 1e-2, "Float8CurrentScaling": 0.12, "Float8BlockScaling": 0.12}


def taken(backend: Any, T: int, **how: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = {name: 0.1 * p.cuda() for name, p in naive.draw(CONFIG, torch.bfloat16).items()}
    x = torch.randn(T, CONFIG.dim, generator=generator).bfloat16().cuda()
    ids = torch.randint(0, CONFIG.n_routed_experts - 1, (T, 2), generator=generator).cuda()  # the last expert is idle
    routing = Routing(ids, torch.rand(T, 2, generator=generator).cuda())
    y, found = naive.grads_of(experts, params, x, routing, config=CONFIG, backend=backend, **how)
    return {"y": y, **found}


@pytest.mark.parametrize("T", [0, 1, 100])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", BOUNDS)
def test_L3_te_is_loop_within_the_rounding_of_its_products(kind: str | None, recompute: bool, T: int) -> None:
    from transformer_engine.common import recipe

    on = getattr(recipe, kind)() if kind else None
    found, right = taken(partial(te.te, recipe=on), T, recompute=recompute), taken("loop", T)
    for name in right:
        assert not found[name].isnan().any(), name
        naive.near(found[name], right[name], BOUNDS[kind])
        if name in naive.draw(CONFIG):
            assert not found[name][-1].any(), f"{name}: the idle expert's gradient"


def test_L3_it_repeats_bit_for_bit() -> None:
    assert all(torch.equal(a, b) for a, b in zip(taken("te", 50).values(), taken("te", 50).values(), strict=True))
