"""`from_hf(hf, device_mesh=...)` and DTensors both ways, on two real gloo processes: gathered, they are right."""

import distributed
import hf_synthetic as synthetic
import pytest
import torch
import torch.distributed as dist
from mesh_cases import BLOCK, gathered, hf_tensors, quietly, shares
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fmoe
from fmoe.codecs.fp8 import quantize
from fmoe.testing import same


def halves_follow_their_axes(mesh: DeviceMesh) -> None:
    """Cut by rows, gate and up become blocks of each half: a strided shard, which gathers to the right tensor."""
    config, tensors = synthetic.step3p5()
    for adapter, hf in (
        (fmoe.adapter("per_expert"), hf_tensors()),
        (fmoe.adapter("step3p5", config), {n: t for n, t in tensors.items() if t.ndim == 3 and "moe" in n}),
    ):
        whole, ndim = adapter.from_hf(hf), next(iter(hf.values())).ndim
        for dim in range(ndim):
            cut = {n: distribute_tensor(t, mesh, [Shard(dim)]) for n, t in hf.items()}
            native = quietly(adapter.from_hf, cut)
            same(gathered(native), whole)
            key = next(n for n in native if n.endswith("gate_and_up_projs"))
            if dim == ndim - 2:
                assert native[key].placements == (_StridedShard(2, split_factor=2),)
            back = quietly(adapter.to_hf, native)
            assert all(back[n].placements == (Shard(dim),) for n in hf)
            same(gathered(back), hf)
        key = next(n for n in whole if n.endswith("gate_and_up_projs"))
        halves = {n: distribute_tensor(t, mesh, [Shard(t.ndim - 1)]) for n, t in whole.items() if n == key}
        back = quietly(adapter.to_hf, halves)  # gate lives on one rank, up on the other
        mine = ("gate", "up")[dist.get_rank()]
        assert back and all(f".{mine}_proj" in n and not isinstance(t, DTensor) for n, t in back.items())
        same(back, {n: hf[n] for n in back})
        total = {n: DTensor.from_local(t * (dist.get_rank() + 1), mesh, [Partial()]) for n, t in hf.items()}
        same(gathered(quietly(adapter.from_hf, total)), adapter.from_hf({n: t * 3 for n, t in hf.items()}))


def what_does_not_fit_is_refused(mesh: DeviceMesh) -> None:
    hf, adapter = hf_tensors(I=5), fmoe.adapter("per_expert")
    cut = lambda place, n: distribute_tensor(hf[n], mesh, [place])
    with pytest.raises(fmoe.AdapterError, match="Shard.*cuts i = 5 unevenly, beside other axes") as error:
        adapter.from_hf({n: cut(Shard(0), n) for n in hf})
    assert all("gate" in key or "up" in key for key in error.value.keys)
    first = next(iter(hf))
    for other in (hf[first], cut(Shard(1), first)):
        with pytest.raises(fmoe.AdapterError, match="one stack, several placements") as error:
            adapter.from_hf({n: cut(Replicate(), n) for n in hf} | {first: other})
    short = DTensor.from_local(torch.zeros(4, 8, 6), mesh, [Shard(1)], shape=torch.Size((4, 8, 6)), stride=(48, 6, 1))
    with pytest.raises(fmoe.AdapterError, match=r"this rank's part is \[4, 8, 6\], expected \[4, 4, 6\]"):
        adapter.to_hf({f"{BLOCK}gate_and_up_projs": short})


def views_and_other_storage(mesh: DeviceMesh) -> None:
    hf, adapter = hf_tensors(), fmoe.adapter("per_expert")
    native = adapter.from_hf(hf, mesh)
    views = quietly(adapter.views, native)
    assert len(views) == len(hf) / 2 and set(views.written()) == set(native)
    for tensor in views.values():
        tensor.fill_(dist.get_rank())
    assert all((t.to_local() == dist.get_rank()).all() for t in native.values())
    meta = {n: torch.empty_like(t, device="meta") for n, t in native.items()}
    assert adapter.to_hf(meta).keys() == views.keys() and all(t.is_meta for t in adapter.to_hf(meta).values())
    again = adapter.from_hf(hf, mesh, copy=True, contiguous=True)
    assert all(t.to_local().is_contiguous() for t in again.values())
    for made in (adapter.to_hf(again, copy=True), adapter.to_hf(again, contiguous=True)):
        same(made, {n: hf[n] for n in made})
    assert dict(adapter.iter_hf(again)).keys() == views.keys()
    # tied tensors are compared part by part, and tensors that only the cast changes are cast so
    tied = fmoe.alias("lm_head", of="embed") | fmoe.keep("{rest}")
    x = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    assert quietly(tied.from_hf, {"embed": x, "lm_head": x.clone()}).keys() == {"embed"}
    with pytest.raises(fmoe.AdapterError, match="values differ"):
        tied.from_hf({"embed": x, "lm_head": x + 1})
    casts = fmoe.adapter("per_expert", dtype="bfloat16")
    half = casts.from_hf({n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in hf.items()})
    same(gathered(half), casts.from_hf(hf))


def quantised_parts(mesh: DeviceMesh) -> None:
    """FP8 in DTensors: decoded and encoded where each part has whole blocks, its scales beside it; else refused."""
    name, weight = "model.q_proj.weight", torch.randn(512, 256)
    adapter = fmoe.adapter("qwen3_moe")
    q, s = quantize(weight)
    hf = {name: q, f"{name}_scale_inv": s}
    for dim in (0, 1):
        cut = {n: distribute_tensor(t.view(torch.uint8) if t is q else t, mesh, [Shard(dim)]) for n, t in hf.items()}
        cut[name] = DTensor.from_local(cut[name].to_local().view(q.dtype), mesh, [Shard(dim)])
        native = quietly(adapter.from_hf, cut)
        same(gathered(native), adapter.from_hf(hf))
        back = quietly(adapter.to_hf, native)
        same({n: t.to_local() for n, t in back.items()}, {n: t.to_local() for n, t in cut.items()})
    with pytest.raises(fmoe.AdapterError, match="each part whole blocks of 128") as error:
        adapter.from_hf(cut | {f"{name}_scale_inv": s})
    assert set(error.value.keys) == set(hf)


def on_two_ranks() -> None:
    for shape, names in (((2,), ("ep",)), ((2, 1), ("ep_shard", "ep")), ((1, 2), ("ep_shard", "ep")), ((2,), ("dp",)),
                         ((2,), ("ep_shard",))):  # fmt: skip
        shares(init_device_mesh("cpu", shape, mesh_dim_names=names))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    for check in (halves_follow_their_axes, what_does_not_fit_is_refused, views_and_other_storage, quantised_parts):
        check(mesh)


def test_two_ranks():
    distributed.run(on_two_ranks, 2)
