"""L3: DeepEP V2 itself, one rank on one GPU: `python -m pytest tests/gpu/gpu_deep_ep.py`. Never run yet.

Not collected by default, so that no skip looks like a test. `deepep` itself gives one rank `local`; here the buffer is
made all the same, which shows what the source alone cannot: that the handle of narrow rows carries wide ones.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import fmoe
from fmoe import MoEConfig, Routing
from fmoe.dispatch import Dispatcher
from fmoe.dispatch.deepep import Plan, _back, _forth, _plan
from fmoe.dispatch.deepep_wire import Wire
from fmoe.dispatch.pair import pair

CONFIG = MoEConfig(n_routed_experts=8, n_activated_experts=3, dim=512, moe_inter_dim=64)


@pytest.fixture(scope="module")
def d() -> Iterator[Dispatcher]:
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    with pair(Wire(None, CONFIG, 256, "elastic", {}), Plan, _plan, _forth, _back) as made:
        yield made
    dist.destroy_process_group()


@pytest.mark.parametrize("T", [0, 1, 200])
def test_L3_one_rank_is_local(d: Dispatcher, T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, CONFIG.dim, generator=generator).bfloat16().cuda()
    ids = torch.rand(T, 8, generator=generator).argsort(1)[:, :3].cuda()
    ids[1::5] = -1
    w, mask = torch.rand(T, 3, generator=generator).cuda(), (torch.arange(T) % 3 > 0).cuda()
    found = []
    for dispatcher in (d, fmoe.dispatch.local):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        plan = dispatcher.plan(Routing(ids, w, mask), CONFIG)
        rows = dispatcher.dispatch(*leaves, plan)
        y = dispatcher.combine(torch.tanh(rows.x) * rows.weights[:, None], plan)
        again = dispatcher.dispatch(*leaves, plan)
        assert torch.equal(again.x, rows.x) and torch.equal(again.weights, rows.weights)
        found.append([rows.x, rows.weights, rows.counts, y, *torch.autograd.grad(y.square().sum(), leaves)])
    for i, (mine, right) in enumerate(zip(*found, strict=True)):
        assert torch.equal(mine, right) if i < 3 else torch.allclose(mine, right, rtol=2e-2, atol=2e-2), i
