"""GroupedExperts: the function with parameters attached, on one device and on meshes of real processes."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dispatchers
import distributed
import naive
import pytest
import simulate_deep_ep
import simulate_te
import torch
import torch.distributed as dist
from dispatchers import AFTER, CONFIG, batch, of_rank
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe import Routing
from fmoe.nn import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE

NAMES = ["gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"]


def module(config: fmoe.MoEConfig = CONFIG, **how: Any) -> GroupedExperts:
    made = GroupedExperts(config, **how)
    made.load_state_dict(naive.draw(config, config.dtype))
    return made


def run(layer: torch.nn.Module, x: Tensor, routing: Routing, r: Tensor, *, again: bool = False) -> dict[str, Tensor]:
    """y and every gradient; those of DTensors in full."""
    x, w = x.detach().clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    args = (x, routing.mask, w, routing.indices)
    y = checkpoint(layer, *args, use_reentrant=False) if again else layer(*args)
    (y * r).sum().backward()
    whole = lambda g: g.full_tensor() if isinstance(g, DTensor) else g
    assert all(p.grad is not None and type(p.grad) is type(p.data) for p in layer.parameters())
    return {"y": y.detach(), "x": x.grad, "w": w.grad} | {n: whole(p.grad) for n, p in layer.named_parameters()}


def test_it_is_the_function_under_the_seeds_names() -> None:
    layer = module()
    assert list(layer.state_dict()) == NAMES and list(GroupedExperts(replace(CONFIG, expert_bias=False)).state_dict())
    assert GroupedExperts(replace(CONFIG, expert_bias=False)).down_proj_bias is None
    _, x, routing, r = batch("poisoned", 2)
    found, right = run(layer, x, routing, r), dispatchers.expected("poisoned", 2)
    for name in right:
        naive.near(found[name], right[name], 1e-12)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x, routing.mask, routing.weights, routing.indices), found["y"])


@pytest.mark.parametrize("backend", [None, "loop", "torch", "torch_mm", "gmm", SimpleNamespace(experts="torch_mm")])
def test_backends_by_name_by_the_seeds_name_and_by_its_config(backend: Any) -> None:
    _, x, routing, _ = batch("uneven", 2)
    layer = module(AFTER, backend=backend)
    expected = fmoe.experts(dict(layer.named_parameters()), x, routing, AFTER, backend="loop")
    naive.near(layer(x, None, routing.weights, routing.indices), expected, 1e-12)


def test_relu2_dtypes_and_lora() -> None:
    config = replace(CONFIG, expert_activation="relu2", dtype="bf16", expert_bias=False)
    layer = GroupedExperts(config)
    E, D, I = config.n_routed_experts, config.dim, config.moe_inter_dim
    assert layer.gate_and_up_projs.shape == (E, D, I) and layer.down_projs.dtype == torch.bfloat16
    layer.lora_down_A, layer.lora_down_B = (torch.nn.Parameter(torch.randn(E, *s)) for s in ((I, 2), (2, D)))
    _, x, routing, _ = batch("uneven", 2)
    x = x.bfloat16()
    expected = fmoe.experts(dict(layer.named_parameters()), x, routing, config)
    assert torch.equal(layer(x, None, routing.weights, routing.indices), expected)


def test_it_compiles_in_one_graph() -> None:
    _, x, routing, r = batch("uneven", 2)
    layer = module()
    expected = run(layer, x, routing, r)
    layer.zero_grad()
    found = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, routing, r)
    for (name, right), value in zip(expected.items(), found.values(), strict=True):
        assert torch.allclose(value, right, rtol=1e-12, atol=1e-12), name


def test_weights_are_drawn_and_biases_zero() -> None:
    torch.manual_seed(0)
    layer = GroupedExperts(replace(CONFIG, dim=64, moe_inter_dim=64))
    for name in NAMES[:2]:
        p = getattr(layer, name)
        assert abs(p.std() - 0.02) < 1e-3 and abs(p.mean()) < 1e-3
    layer.down_proj_bias.data.fill_(5)
    layer.init_weights(torch.device("cpu"), init_std=2.0)
    assert not layer.down_proj_bias.any() and abs(layer.down_projs.std() - 2) < 0.1
    with torch.device("meta"):
        assert GroupedExperts(CONFIG).down_projs.is_meta


# (mesh, placements of the experts): dims are cut in the order of the mesh
MESHES = {
    "ep": ({"ep": 4}, [Shard(0)]),
    "a mesh of one dim": ({"dp": 4}, [Shard(0)]),
    "ep_shard, ep": ({"ep_shard": 2, "ep": 2}, [Shard(1), Shard(0)]),
    "ep_replicate, ep": ({"ep_replicate": 2, "ep": 2}, [Replicate(), Shard(0)]),
    "ep_shard alone": ({"ep_shard": 4}, [Shard(1)]),
    "all experts everywhere": ({"ep_shard": 4, "ep": 1}, [Shard(1), Shard(0)]),
    "experts cut by FSDP, not by ep": ({"dp": 2, "ep": 2}, [Shard(0), Replicate()]),
}


def on_meshes() -> dict[str, dict[str, Tensor]]:
    """For each mesh: this rank's y and gradients, and the parameters' in full."""
    found = {}
    for name, (dims, placements) in MESHES.items():
        mesh = init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))
        for again in (False, True):
            layer = module()
            for key, p in list(layer.named_parameters()):
                where = [Shard(min(q.dim, p.ndim - 1)) if isinstance(q, Shard) else q for q in placements]
                where = [Replicate() if i != 0 and w == where[0] and w.dim else w for i, w in enumerate(where)]
                layer.register_parameter(key, torch.nn.Parameter(distribute_tensor(p.data, mesh, where)))
            found[f"{name}{', checkpointed' * again}"] = _mine(layer, again)
    found["FSDP over ep"] = _mine(_fsdp({"ep_shard": 2, "ep": 2}))
    found["FSDP without ep"] = _mine(_fsdp({"dp": 4}))
    return found


def _fsdp(dims: dict[str, int]) -> GroupedExperts:
    mesh, layer = init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims)), module()
    if "ep" in dims:
        for key, p in list(layer.named_parameters()):
            p = torch.nn.Parameter(distribute_tensor(p.data, mesh["ep"], [Shard(0)]))
            layer.register_parameter(key, p)
    outer = next(iter(dims))
    fully_shard(layer, mesh=mesh[outer], shard_placement_fn=lambda p: Shard(1 if "ep" in dims else 0))
    layer.set_gradient_divide_factor(1.0)  # sums, as everywhere here
    return layer


def _mine(layer: GroupedExperts, again: bool = False) -> dict[str, Tensor]:
    lengths, *tokens = batch("uneven", 4)
    x, routing, r = tokens
    x, r, *parts = of_rank((x, r, *routing), lengths, dist.get_rank())
    return run(layer, x, Routing(*parts), r, again=again)


def test_on_meshes_every_gradient_is_that_of_one_process() -> None:
    ranks, right = distributed.run(on_meshes, 4, timeout=180), dispatchers.expected("uneven", 4)
    lengths = batch("uneven", 4).lengths
    assert len(ranks[0]) == 2 * len(MESHES) + 2
    for rank, meshes in enumerate(ranks):
        for mesh, found in meshes.items():
            for name, value in found.items():
                exact = right[name] if name in NAMES else of_rank([right[name]], lengths, rank)[0]
                assert float((value - exact).norm()) <= 1e-12 * max(1.0, float(right[name].norm())), (rank, mesh, name)


def drawn_and_refused() -> tuple[dict[str, Tensor], list[str]]:
    torch.manual_seed(3)
    layer, mesh = GroupedExperts(CONFIG), init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep_shard", "ep"))
    for key, p in list(layer.named_parameters()):
        layer.register_parameter(key, torch.nn.Parameter(distribute_tensor(p.data * 0, mesh, [Replicate(), Shard(0)])))
    torch.manual_seed(3)
    layer.init_weights()
    drawn = {name: p.full_tensor().detach() for name, p in layer.named_parameters()}
    _, x, routing, _ = batch("even", 2)
    says = []
    for change in (
        lambda: layer(DTensor.from_local(x, mesh["ep"], [Replicate()]), None, routing.weights, routing.indices),
        lambda: fmoe.experts(dict(layer.named_parameters()), x, routing, CONFIG),
        lambda: (
            layer.register_parameter("down_projs", _cut(layer, mesh, 1))
            or layer(x, None, routing.weights, routing.indices)
        ),
        lambda: (
            layer.register_parameter("down_projs", _cut(layer, mesh, None))
            or layer(x, None, routing.weights, routing.indices)
        ),
    ):
        with pytest.raises(ValueError) as error:
            change()
        says.append(str(error.value))
    return drawn, says


def _cut(layer: GroupedExperts, mesh: Any, dim: int | None) -> torch.nn.Parameter:
    where = Replicate() if dim is None else Shard(dim)
    return torch.nn.Parameter(distribute_tensor(layer.down_projs.data.full_tensor(), mesh, [Replicate(), where]))


def test_shards_are_drawn_as_one_tensor_and_odd_ones_refused() -> None:
    drawn, says = distributed.run(drawn_and_refused, 2)[1]
    torch.manual_seed(3)
    for name, p in GroupedExperts(CONFIG).named_parameters():
        assert torch.equal(drawn[name], p), name
    x, plain, other_dim, mixed = says
    assert "x is a DTensor, expected this rank's tokens" in x
    assert "'gate_and_up_projs' is a DTensor, expected this rank's experts" in plain
    assert "'down_projs' is S(1)" in other_dim or "'down_projs' is Shard(dim=1)" in other_dim
    assert "'down_projs': 'whole'" in mixed and "expected all DTensors on one mesh, cut alike" in mixed


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


@pytest.mark.parametrize("kind", [GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE])
def test_L0_state_dicts_are_the_seeds_and_say_what_is_missing_and_unexpected(kind: type[GroupedExperts]) -> None:
    layer = kind(CONFIG)
    state = layer.state_dict()
    assert list(state) == NAMES and layer.down_projs.dtype == torch.float64
    assert list(kind(replace(CONFIG, expert_bias=False)).state_dict()) == NAMES[:2]
    found = layer.load_state_dict({NAMES[0]: state[NAMES[0]], "down_linear.weight0": state[NAMES[1]][0]}, strict=False)
    assert found.missing_keys == NAMES[1:] and found.unexpected_keys == ["down_linear.weight0"]
    with pytest.raises(RuntimeError, match="size mismatch for down_projs"):
        layer.load_state_dict(state | {"down_projs": state["down_projs"].mT})
    again = kind(CONFIG)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state.values(), strict=True))


def test_L1_te_on_one_rank_is_the_function() -> None:
    config = replace(AFTER, dtype=torch.float32)
    _, x, routing, r = batch("idle experts", 2)
    x, r, routing = x.float(), r.float(), routing._replace(weights=routing.weights.float())
    layer, other = GroupedExpertsTE(config), GroupedExperts(config, "loop")
    for each in (layer, other):
        each.load_state_dict(naive.draw(config, torch.float32))
    with simulate_te.installed() as world:
        found = run(layer, x, routing, r)
        assert len(world.named("GroupedLinear.forward")) == 2
    for name, right in run(other, x, routing, r).items():
        naive.near(found[name], right, 2e-6)


BLOCKS = {
    "bare": replace(CONFIG, expert_bias=False),
    "everything": replace(
        CONFIG,
        n_shared_experts=2,
        shared_expert_gate=True,
        moe_latent_size=5,
        router_bias=True,
        score_func="sigmoid_with_bias",
        force_e_score_correction_bias=True,
    ),
    "relu2": replace(CONFIG, n_shared_experts=1, shared_expert_inter_dim=7, shared_expert_activation="relu2"),
}


@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_L0_a_block_is_the_function(config: fmoe.MoEConfig) -> None:
    layer = MoE(config, "loop")
    layer.init_weights(init_std=0.5)
    x = torch.randn(2, 5, config.dim, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = False
    state = layer.state_dict(keep_vars=True)
    y, right = layer(x, mask), fmoe.moe(state, x, config, backend="loop", mask=mask)
    assert torch.equal(y, right) and y.shape == x.shape and bool(y[0, 1].any()) == bool(config.n_shared_experts)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (y, right)), strict=True):
        assert torch.equal(a, b)
    assert {name.split(".")[0] for name in state} == {
        *("gate", "experts"),
        *(("shared_experts",) if config.n_shared_experts else ()),
        *(("shared_expert_gate",) if config.shared_expert_gate else ()),
        *(("fc1_latent_proj", "fc2_latent_proj") if config.moe_latent_size else ()),
    }
    assert ("gate.e_score_correction_bias" in state) == config.force_e_score_correction_bias
    again = MoE(config, "loop")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, mask), y)
