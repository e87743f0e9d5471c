"""GroupedExperts: the function with parameters attached, on one device and on meshes of real processes."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dispatchers
import distributed
import naive
import pytest
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
from fmoe.nn import GroupedExperts

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
