"""L1: the modules of DeepEP and Transformer Engine on two ranks, over their simulators."""

from dataclasses import replace
from typing import Any

import dispatchers
import distributed
import naive
import pytest
import simulate_deep_ep
import simulate_te
import torch
import torch.distributed as dist
from dispatchers import CONFIG, batch, of_rank
from module_cases import BLOCKS, NAMES, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fmoe import Routing
from fmoe.nn import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE

BF16 = replace(CONFIG, dim=256, moe_inter_dim=16, dtype="bf16")


def on_edges() -> dict[str, Any]:
    """This rank's y and gradients of the modules of DeepEP and Transformer Engine, over their simulators."""
    mesh, found, rank = (
        init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep_shard", "ep")),
        dict[str, Any](),
        dist.get_rank(),
    )
    lengths, x, routing, r = batch("masked", 2)
    mine = of_rank((x, r, *routing), lengths, rank)
    for kind in ("buffer", "elastic"):
        with simulate_deep_ep.installed(kind, exact=True) as world:
            layer = GroupedExpertsDeepEP(CONFIG, backend="gmm")
            layer.load_state_dict(naive.draw(CONFIG))
            layer.init_token_dispatcher(mesh, max_tokens=8)
            ids = mine[2] if kind == "buffer" else torch.stack([torch.randperm(8)[:3] for _ in mine[2]])
            found[kind] = run(layer, mine[0], Routing(ids, *mine[3:]), mine[1])
            found[kind] |= {"state": {n: (type(t).__name__, t.full_tensor()) for n, t in layer.state_dict().items()}}
            layer.close()
            found[kind]["closed"], found[kind]["moved"] = sorted(world.destroyed), world.of(rank)
            with pytest.raises(RuntimeError) as error:
                layer(mine[0], mine[4], mine[3], ids)
            found[kind]["says"] = str(error.value)
    with simulate_deep_ep.installed("elastic"), simulate_te.installed() as te:
        layer = GroupedExpertsTE(BF16)
        layer.load_state_dict(naive.draw(BF16, torch.bfloat16))
        layer.init_token_dispatcher(mesh["ep"], max_tokens=8)
        x, routing = tokens_of(rank)
        found["te"] = run(layer, x, routing, torch.ones_like(x))
        found["calls"] = len(te.named("GroupedLinear.forward"))
        layer.close()
    return found | {"blocks": blocks()}


def blocks() -> Tensor:
    """y of a block on one rank, and with its experts on two: moved by all_gather, and by DeepEP's simulator."""
    mesh, config = (
        init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)),
        replace(BLOCKS["everything"], moe_latent_size=6),
    )
    torch.manual_seed(1)
    x, outs = torch.randn(4, config.dim, dtype=torch.float64), []
    for kind in (GroupedExperts, GroupedExpertsDeepEP):
        torch.manual_seed(2)
        layer = MoE(config, experts=kind(config))
        layer.init_weights(init_std=0.5)
        outs.append(layer(x).detach())
        with simulate_deep_ep.installed("elastic", exact=True):
            if isinstance(layer.experts, GroupedExpertsDeepEP):
                layer.experts.init_token_dispatcher(mesh, max_tokens=4)
            else:
                for name, p in list(layer.experts.named_parameters()):
                    cut = torch.nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)]))
                    layer.experts.register_parameter(name, cut)
            outs.append(layer(x).detach())
    return torch.stack(outs)


def tokens_of(rank: int) -> tuple[Tensor, Routing]:
    noise = torch.Generator().manual_seed(rank)
    ids = torch.stack([torch.randperm(8, generator=noise)[:3] for _ in range(5 - rank)])
    x = torch.randn(5 - rank, BF16.dim, generator=noise).bfloat16()
    return x, Routing(ids, torch.rand(*ids.shape, generator=noise), torch.arange(5 - rank) != 1)


def test_L1_modules_of_deepep_and_te_on_two_ranks() -> None:
    ranks, right = distributed.run(on_edges, 2, timeout=120), dispatchers.expected("masked", 2)
    lengths = batch("masked", 2).lengths
    for rank, found in enumerate(ranks):
        for name in right:
            exact = right[name] if name in NAMES else of_rank([right[name]], lengths, rank)[0]
            assert float((found["buffer"][name] - exact).norm()) <= 1e-12 * max(1.0, float(right[name].norm())), name
        for kind in ("buffer", "elastic"):
            assert found[kind]["moved"][-5:] == ["cached", "combine"] * 2 + ["destroy"]
            for name, p in naive.draw(CONFIG).items():
                assert found[kind]["state"][name][0] == "DTensor" and torch.equal(found[kind]["state"][name][1], p)
            assert found[kind]["closed"] == [rank] and "expected init_token_dispatcher(ep_mesh)" in found[kind]["says"]
        assert found["calls"] == 2
        once, *others = found["blocks"]
        assert all(float((y - once).norm()) <= 1e-12 * float(once.norm()) for y in others)
    batches = [tokens_of(rank) for rank in (0, 1)]
    x, routing = (
        torch.cat([x for x, _ in batches]),
        Routing(*map(torch.cat, zip(*(r for _, r in batches), strict=True))),
    )
    whole = GroupedExperts(BF16, "loop")
    whole.load_state_dict(naive.draw(BF16, torch.bfloat16))
    for name, exact in run(whole, x, routing, torch.ones_like(x)).items():
        theirs = [found["te"][name] for found in ranks]
        naive.near(theirs[0] if name in NAMES else torch.cat(theirs), exact, 2e-2)
