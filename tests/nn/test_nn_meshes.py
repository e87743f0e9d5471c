"""GroupedExperts on meshes of real processes: every gradient is that of one process, and shards are drawn as one."""

from dataclasses import replace
from typing import Any

import dispatchers
import distributed
import pytest
import torch
import torch.distributed as dist
from dispatchers import CONFIG, batch, of_rank
from module_cases import NAMES, module, run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fmoe
from fmoe import Routing
from fmoe.nn import GroupedExperts

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


def normed(where: list[Any] | None = None, ep: Any = None) -> dict[str, Tensor]:
    """With a norm that serves all experts: of one process, or of this rank, experts cut along ep and the norm so."""
    torch.manual_seed(5)
    layer = GroupedExperts(replace(CONFIG, expert_norm_eps=1e-6))
    lengths, x, routing, r = batch("uneven", 2)
    if where is not None:
        norm = layer.post_expert_norm
        for part, placements in ((layer, [Shard(0)]), (norm, where)):
            for key, p in list(part.named_parameters(recurse=False)):
                part.register_parameter(key, torch.nn.Parameter(distribute_tensor(p.data, ep, placements)))
        x, r, *parts = of_rank((x, r, *routing), lengths, dist.get_rank())
        routing = Routing(*parts)
    return run(layer, x, routing, r)


def both_normed() -> list[dict[str, Tensor]]:
    ep = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    return [normed(where, ep) for where in ([Replicate()], [Shard(0)])]


def test_a_norm_of_all_experts_gets_the_gradient_of_all_ranks() -> None:
    right = normed()
    for found in distributed.run(both_normed, 2)[1]:
        for name in right.keys() - {"x", "w", "y"}:
            assert float((found[name] - right[name]).norm()) <= 1e-12 * float(right[name].norm()), name


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
