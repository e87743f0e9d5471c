"""`from_hf(hf, device_mesh=...)` and DTensors both ways, on real gloo processes: gathered, they are right."""

from itertools import product
from typing import Any

import distributed
import hf_synthetic as synthetic
import pytest
import torch
import torch.distributed as dist
from test_placements import cut
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import fmoe
from fmoe.layout.sharded.placements import cuts_of, gathers, indices_of
from fmoe.testing import same

SOURCES = {"qwen3_5_moe": synthetic.qwen3_5_moe, "deepseek_v3": synthetic.deepseek_v3, "step3p5": synthetic.step3p5}
SOURCES["deepseek_v3 fp8"] = synthetic.deepseek_v3_fp8
BLOCK = "model.layers.0.mlp.experts."


def gathered(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: whole_of(t) if isinstance(t, DTensor) else t for n, t in params.items()}


def whole_of(tensor: DTensor) -> torch.Tensor:
    try:
        return tensor.full_tensor()
    except ValueError:  # torch 2.11 puts strided shards together for FSDP only, and refuses others: by hand
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, ([list(i) for i in indices_of(tensor)], tensor.to_local()))
        out = torch.zeros(tensor.shape, dtype=tensor.dtype)
        for indices, local in found:
            out[torch.meshgrid(*map(torch.tensor, indices), indexing="ij")] = local
        return out


def quietly(convert: Any, *args: Any, **how: Any) -> dict[str, Any]:
    """convert(...), which does not communicate."""
    with CommDebugMode() as comm:
        made = convert(*args, **how)
    assert comm.get_total_counts() == 0
    return made


def shares(mesh: DeviceMesh) -> None:
    """This rank's share of every family's tensors, gathered, is the whole; and so is what goes back."""
    names = mesh.mesh_dim_names
    for name, make in SOURCES.items():
        config, tensors = make()
        adapter = fmoe.adapter(name.split()[0], config)
        whole, mine = adapter.from_hf(tensors), quietly(adapter.from_hf, tensors, mesh)
        assert mine.keys() == whole.keys()
        for key, tensor in mine.items():
            expert = key.endswith(("gate_and_up_projs", "down_projs")) or "_projs_scale" in key
            assert isinstance(tensor, DTensor) == expert, key
            if expert and "ep" in names:
                held = 1 if all(mesh[n].size() == 1 for n in names if n != "ep") else len(names)
                assert len(tensor.placements) == held and tensor.placements[-1] == Shard(0)
        same(gathered(mine), whole)
        settled, narrow = adapter.resolve(tensors), "ep_shard" in names and mesh["ep_shard"].size() > 1
        if "fp8" in name and narrow:  # these experts are smaller than the blocks that have one scale
            with pytest.raises(fmoe.AdapterError, match="each part whole blocks of 128"):
                settled.to_hf(mine)
            settled = settled.choose(quantization=False)
            tensors = settled.to_hf(whole)
        back = quietly(settled.to_hf, mine)  # this rank's experts, under their own numbers
        same(gathered(back), {n: tensors[n] for n in back})
        assert any(isinstance(t, DTensor) for t in back.values()) == (
            "step3p5" in name or narrow or "ep_replicate" in names or "qwen3_5" in name
        )
        own = [n for n in tensors if ".experts." in n and n not in back]
        cut = "ep" in names and mesh["ep"].size() > 1 or names == ("dp",)
        assert bool(own) == (cut and any(".experts.0." in n for n in tensors)), own
        one = next(n for n in mine if n.endswith("down_projs"))
        assert dict(settled.convert_single_tensor_to_hf(one, mine[one])).keys() <= tensors.keys() or "fp8" in name


def hf_tensors(E: int = 4, I: int = 6, D: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"gate": (I, D), "up": (I, D), "down": (D, I)}
    return {f"{BLOCK}{e}.{p}_proj.weight": torch.randn(s) for e in range(E) for p, s in shapes.items()}


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
    q, s = fmoe.codecs.fp8.quantize(weight)
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


def uneven_splits(mesh: DeviceMesh) -> None:
    config, tensors = synthetic.qwen3_5_moe()  # 6 experts on 4 ranks: DTensor would cut 2, 2, 2, 0
    with pytest.raises(ValueError, match="6 experts on 4 ranks"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(tensors, mesh)
    hf, adapter = hf_tensors(E=2), fmoe.adapter("per_expert")
    mine = adapter.from_hf(hf, mesh)  # some ranks may have no expert
    assert mine[f"{BLOCK}down_projs"].to_local().shape[0] == (1 if mesh.get_rank() < 2 else 0)
    same(gathered(mine), adapter.from_hf(hf))
    same(back := adapter.to_hf(mine), {n: hf[n] for n in back})
    assert len(back) == (3 if mesh.get_rank() < 2 else 0)
    beside = adapter | fmoe.keep("visual.{rest}")  # a family with more beside it is cut all the same
    assert len(beside.plan(hf).copies) == len(adapter.plan(hf).copies) == 6
    again = beside.from_hf(hf | {"visual.w": torch.ones(3)}, mesh)
    same({n: t.to_local() for n, t in again.items() if n in mine}, {n: t.to_local() for n, t in mine.items()})


def placements_move_with_their_axes(mesh: DeviceMesh) -> None:
    """(ep_shard, ep): what is fused goes on both dims, one by one on ep_shard, and from there back on both."""
    config, tensors = synthetic.qwen3_5_moe()
    adapter = fmoe.adapter("qwen3_5_moe", config)
    sharded = {
        n: distribute_tensor(t, mesh, [Shard(1), Shard(0)]) if t.ndim == 3 and "experts" in n else t
        for n, t in tensors.items()
    }
    for native in (quietly(adapter.from_hf, sharded), quietly(adapter.from_hf, sharded, mesh)):  # cut no second time
        key = "model.language_model.layers.0.mlp.experts.gate_and_up_projs"
        assert native[key].placements == (Shard(2), Shard(0))
        same(gathered(native), adapter.from_hf(tensors))
        back = quietly(adapter.to_hf, native)
        assert all(back[n].placements == t.placements for n, t in sharded.items() if isinstance(t, DTensor))
    split = fmoe.adapter("qwen3_5_moe", config, layout="per_expert", mtp_layout="per_expert")
    with pytest.raises(fmoe.AdapterError, match="cuts|across more than one axis"):  # gate on one rank, up on the other,
        thirds = [_StridedShard(2, split_factor=3), Shard(0)]
        split.to_hf({key: cut(adapter.from_hf(tensors)[key], mesh, thirds)})
    hf = hf_tensors()
    adapter, ep_shard = fmoe.adapter("per_expert"), mesh["ep_shard"]
    narrow = {n: distribute_tensor(t, ep_shard, [Shard(1)], src_data_rank=None) for n, t in hf.items()}
    native = quietly(adapter.from_hf, narrow, mesh)
    assert {tuple(t.placements) for t in native.values()} == {(Shard(1), Shard(0))}
    same(gathered(native), adapter.from_hf(hf))
    back = quietly(adapter.to_hf, native)
    assert len(back) == len(hf) / 2 and all(t.device_mesh == ep_shard for t in back.values())
    same(gathered(back), {n: hf[n] for n in back})
    fsdp = {n: distribute_tensor(t, mesh, [Shard(0), Replicate()]) for n, t in hf.items()}
    native = quietly(adapter.from_hf, fsdp, mesh)  # copies along `ep` are cut there
    assert native[f"{BLOCK}down_projs"].placements == (Shard(2), Shard(0))
    same(gathered(native), adapter.from_hf(hf))
    down = {n: distribute_tensor(t, mesh, [Shard(0), Shard(0)]) for n, t in hf.items() if "down" in n}
    rule = fmoe.rule("{pre}experts.{e}.down_proj.weight [d i]", "{pre}experts.down_projs [e i d]")
    native = quietly(rule.from_hf, down, mesh)  # and what `ep` cuts already stays as it is
    assert native[f"{BLOCK}down_projs"].placements == (Shard(2), Shard(2))
    same(gathered(native), rule.from_hf({n: hf[n] for n in down}))


def torch_gathers_what_we_make(mesh: DeviceMesh) -> None:
    """torch's own way back of two cuts of one dimension; it is wrong, or raises, for two strided ones."""
    x, kinds = torch.arange(96.0), [Shard(0), *(_StridedShard(0, split_factor=n) for n in (2, 3, 4, 6))]
    for a, b in product(kinds, kinds):
        tensor = cut(x, mesh, [a, b])
        if gathers([c for _, c in cuts_of(tensor)]):
            assert torch.equal(whole_of(tensor), x), (a, b)
    hf = {f"x.{g}": cut(torch.arange(96.0).view(48, 2), mesh, [Shard(0), Shard(0)]) for g in range(2)}
    with pytest.raises(fmoe.AdapterError, match="which torch gathers in another order"):
        fmoe.rule("x.{g} [i d]", "y [d (g i)]", g=2).from_hf(hf)
    same(
        gathered(fmoe.rule("x.{g} [i d]", "y [g d i]").from_hf(hf)),
        {"y": torch.stack([t.full_tensor().T for t in hf.values()])},
    )


def on_four_ranks() -> None:
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    uneven_splits(four)
    meshes = {names: init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
              for names in (("ep_shard", "ep"), ("ep_replicate", "ep"))}  # fmt: skip
    for mesh in meshes.values():
        shares(mesh)
    placements_move_with_their_axes(meshes["ep_shard", "ep"])
    torch_gathers_what_we_make(meshes["ep_shard", "ep"])


def test_two_ranks():
    distributed.run(on_two_ranks, 2)


def test_four_ranks():
    distributed.run(on_four_ranks, 4)
