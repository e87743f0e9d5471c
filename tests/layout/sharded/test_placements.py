"""DTensors convert where they are: every rank's part of the result is torch's own shard of the whole result.

Each rank is seen in turn on a fake world in this process; torch cuts the whole tensors, we convert the cuts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fmoe
from fmoe.layout.sharded.placements import cuts_of, gathers
from fmoe.testing import checkpoints, rules

Meshes = Mapping[str, int]


@contextmanager
def seen_by(rank: int, sizes: Meshes) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(sizes.values()))
    try:
        yield init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        dist.destroy_process_group()


def cut(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Any:
    """torch's own shard of a whole tensor, in turn for each mesh dim."""
    local = tensor
    for m, p in enumerate(placements):
        if hasattr(p, "dim"):
            n, i, blocks = mesh.size(m), mesh.get_local_rank(m), getattr(p, "split_factor", 1)
            local = torch.cat([_chunk(b, n, i, p.dim) for b in _chunks(local, blocks, p.dim)], p.dim)
    return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def _chunks(tensor: torch.Tensor, n: int, dim: int) -> list[torch.Tensor]:
    made = list(tensor.chunk(n, dim))
    return made + [tensor.narrow(dim, 0, 0)] * (n - len(made))


def _chunk(tensor: torch.Tensor, n: int, i: int, dim: int) -> torch.Tensor:
    return _chunks(tensor, n, dim)[i]


def flat(specs: Mapping[str, fmoe.TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors in which no two elements are alike."""
    at, out = 0, {}
    for name, (shape, _) in specs.items():
        out[name] = torch.arange(at, at + prod(shape)).reshape(shape)
        at += prod(shape)
    return out


def outcome(convert: Any, cuts: Mapping[str, Any]) -> dict[str, Any] | str:
    try:
        with CommDebugMode() as comm:
            made = convert(cuts)
    except fmoe.AdapterError as error:
        assert comm.get_total_counts() == 0 and error.keys
        return error.problems[0]
    assert comm.get_total_counts() == 0
    return made


def check(
    adapter: fmoe.Adapter, hf: Mapping[str, torch.Tensor], sizes: Meshes, placements: Sequence[Placement]
) -> bool:
    """The laws on every rank; whether the placements can be said."""
    native, refused, seen = adapter.from_hf(hf), [], dict[str, int]()
    for rank in range(prod(sizes.values())):
        with seen_by(rank, sizes) as mesh:
            cuts = {n: cut(t, mesh, placements) for n, t in hf.items()}
            made = outcome(adapter.from_hf, cuts)
            refused.append(isinstance(made, str))
            if isinstance(made, str):
                continue
            for name, tensor in made.items():
                seen[name] = seen.get(name, 0) + 1
                if isinstance(tensor, DTensor):
                    assert tensor.shape == native[name].shape
                    expected = cut(native[name], tensor.device_mesh, tensor.placements).to_local()
                    assert torch.equal(tensor.to_local(), expected), (name, tensor.placements)
                else:
                    assert torch.equal(tensor, native[name]), name
            if made and all(isinstance(t, DTensor) and t.device_mesh == mesh for t in made.values()):
                back = outcome(adapter.to_hf, made)
                if isinstance(back, str):  # what torch itself cannot gather we take, and do not make
                    own = [c for d, c in cuts_of(cuts[next(iter(cuts))]) if d is not None]
                    assert "torch gathers in another order" in back and not gathers(own)
                    continue
                assert back.keys() == cuts.keys()
                for name, tensor in back.items():  # a mesh dim of size 1 may fall on a name, and is gone
                    assert torch.equal(
                        tensor.to_local() if isinstance(tensor, DTensor) else tensor, cuts[name].to_local()
                    )
                    if isinstance(tensor, DTensor) and tensor.device_mesh == mesh:
                        trivial = [mesh.size(m) == 1 for m in range(mesh.ndim)]
                        assert all(a == b or t for a, b, t in zip(tensor.placements, placements, trivial, strict=True))
                    else:
                        assert 1 in mesh.shape
    assert all(refused) or not any(refused), "all ranks refuse, or none"
    assert all(refused) or seen.keys() == native.keys()
    return not any(refused)


PLACEMENTS = [Replicate(), Shard(0), Shard(0), Shard(1), Shard(1), Shard(2), Partial()]
PLACEMENTS += [_StridedShard(d, split_factor=n) for d, n in product(range(3), (2, 3))]
MESHES = [{"x": 2}, {"x": 4}, {"x": 3}, {"x": 2, "y": 2}, {"x": 1, "y": 2}, {"x": 2, "y": 3}, {"x": 2, "y": 2, "z": 2}]


@st.composite
def cases(draw: Any) -> tuple[Meshes, list[Placement]]:
    sizes = draw(st.sampled_from(MESHES))
    return sizes, [draw(st.sampled_from(PLACEMENTS)) for _ in sizes]


def fitting(placements: Sequence[Placement], hf: Mapping[str, torch.Tensor]) -> bool:
    return bool(hf) and all(
        getattr(p, "dim", 0) < t.ndim or not hasattr(p, "dim") for p in placements for t in hf.values()
    )


@given(st.data())
def test_any_placement_of_any_rule_follows_or_is_refused_on_every_rank(data):
    adapter, (sizes, placements) = data.draw(rules()), data.draw(cases())
    for way in (adapter, adapter.inverse):
        hf = flat(data.draw(checkpoints(way)))
        if fitting(placements, hf):
            check(way, hf, sizes, placements)


SHAPES = [
    ("x [e d (g i)]", "y [e (g i) d]"),
    ("x.{g} [e i d]", "y [e d (g i)]"),
    ("x.{e}.{g} [i d]", "y [e d (g i)]"),
    ("x.{e} [i d]", "y [e d i]"),
    ("x [e d (i g)]", "y [e (g i) d]"),
    ("x.{g} [e i d]", "y [e d (i g)]"),
    ("x [(e i) d]", "y [e d i]"),
    ("x [i (r e)]", "y [e i r]"),
    ("x [(a b c)]", "y [a c b]"),
    ("x [(a b c)]", "y [(b c) a]"),
]


@pytest.mark.parametrize("hf_, native", SHAPES)
@given(data=st.data())
def test_placements_of_the_layouts_that_there_are(hf_, native, data):
    letters = sorted({c for c in hf_ + native if c.islower()} - set("xy"))
    sizes = {a: data.draw(st.sampled_from([2] if a == "g" else [1, 2, 3, 4, 6, 8])) for a in letters}
    adapter = fmoe.rule(hf_, native, **sizes)
    mesh, placements = data.draw(cases())
    for way in (adapter, adapter.inverse):
        hf = flat(data.draw(checkpoints(way)))
        if fitting(placements, hf):
            check(way, hf, mesh, placements)


def ways(adapter: fmoe.Adapter, hf: Mapping[str, torch.Tensor], n: int, placement: Placement) -> list[Placement]:
    """Every placement of the one native tensor that gives each rank what it has already."""
    (whole,) = adapter.from_hf(hf).values()
    found = [Replicate(), *(_StridedShard(d, split_factor=k) for d in range(whole.ndim) for k in range(1, 25))]
    for rank in range(n):
        with seen_by(rank, {"x": n}) as mesh:
            mine = set(torch.cat([cut(t, mesh, [placement]).to_local().flatten() for t in hf.values()]).tolist())
            found = [p for p in found if set(cut(whole, mesh, [p]).to_local().flatten().tolist()) == mine]
    return found


@pytest.mark.parametrize("hf_, native", SHAPES)
@settings(max_examples=20)
@given(data=st.data())
def test_what_is_refused_no_placement_could_say(hf_, native, data):
    letters = sorted({c for c in hf_ + native if c.islower()} - set("xy"))
    sizes = {a: data.draw(st.sampled_from([2] if a == "g" else [2, 3, 4])) for a in letters}
    adapter = fmoe.rule(hf_, native, **sizes)
    adapter = adapter if "{" in hf_ or data.draw(st.booleans()) else adapter.inverse
    n, hf = data.draw(st.sampled_from([2, 3, 4])), flat(data.draw(checkpoints(adapter)))
    assume(hf)
    hf = {k: t for k, t in hf.items() if len(adapter.from_hf(hf)) == 1}
    assume(hf)
    placement = data.draw(st.sampled_from([Shard(d) for d in range(next(iter(hf.values())).ndim)]))
    even = all(t.shape[placement.dim] % n == 0 for t in hf.values())
    if even and not check(adapter, hf, {"x": n}, [placement]):
        assert not ways(adapter, hf, n, placement)
