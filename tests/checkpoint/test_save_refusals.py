"""fmoe.save refuses what cannot be meant, replaces with force only, and leaves nothing of what ends midway."""

import json
import os
from functools import cache

import hf_synthetic as synthetic
import pytest
import torch
from deaf import Deaf
from directories import files, fill
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

import fmoe
import fmoe.docs
from fmoe.testing import same


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return cache(lambda name: fill(tmp_path_factory.mktemp(name), name))


def test_a_checkpoint_is_replaced_with_force_only_and_then_whole(source, tmp_path):
    path = source("qwen3_moe-float32")
    params, adapter = fmoe.load(path), fmoe.adapter(path)
    fmoe.save(params, tmp_path / "new", adapter, "native", 50_000, fsync=False)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    before = files(tmp_path / "new")
    with pytest.raises(fmoe.AdapterError, match="--force|force=True"):
        fmoe.save(params, tmp_path / "new", adapter)
    assert files(tmp_path / "new") == before
    fmoe.save(params, tmp_path / "new", adapter, force=True, fsync=False)
    assert files(tmp_path / "new").keys() == {"model.safetensors", "config.json", "notes.txt"}
    same(fmoe.load(tmp_path / "new"), params)
    mine = fmoe.load(tmp_path / "new")  # mapped from the very files that are replaced
    fmoe.save(mine, tmp_path / "new", adapter, force=True, fsync=False)
    same(fmoe.load(tmp_path / "new"), params)


REFUSED = {
    "layout='fused': expected 'hf' or 'native'": dict(layout="fused"),
    "max_shard_size is '5 potatoes'": dict(max_shard_size="5 potatoes"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_meant_is_refused(text, source, tmp_path):
    path = source("mixtral-bfloat16")
    with pytest.raises(fmoe.AdapterError, match=text):
        fmoe.save(fmoe.load(path), tmp_path / "new", fmoe.adapter(path), **REFUSED[text])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_parameters_that_do_not_convert_are_refused_with_their_keys(layout, source, tmp_path):
    path = source("qwen3_moe-float32")
    params = fmoe.load(path)
    key = "model.layers.0.mlp.experts.down_projs"
    with pytest.raises(fmoe.AdapterError) as caught:
        fmoe.save({n: t for n, t in params.items() if n != key}, tmp_path / "new", fmoe.adapter(path), layout)
    assert any("experts" in k for k in caught.value.keys)
    with pytest.raises(fmoe.AdapterError) as caught:
        fmoe.save(params | {key: [1.0]}, tmp_path / "new", fmoe.adapter(path), layout)
    assert caught.value.keys == (key,)
    with pytest.raises(fmoe.AdapterError) as caught:
        fmoe.save(params | {key: params[key].to("meta")}, tmp_path / "new", fmoe.adapter(path), layout)
    assert caught.value.keys == (key,)
    with pytest.raises(fmoe.AdapterError) as caught:
        fmoe.save(params | {key: params[key].to(torch.complex128)}, tmp_path / "new", fmoe.adapter(path), layout)
    assert caught.value.keys and all("down_proj" in k for k in caught.value.keys)
    assert not (tmp_path / "new").exists()


def test_dtensors_are_refused_with_their_keys(source, tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    path = source("mixtral-bfloat16")
    params = fmoe.load(path)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        keys = [n for n in params if n.endswith("_projs")]
        params |= {n: distribute_tensor(params[n], mesh, [Replicate()]) for n in keys}
        with pytest.raises(fmoe.AdapterError, match=r"is a DTensor: save what `full_tensor\(\)` gives") as caught:
            fmoe.save(params, tmp_path / "new", fmoe.adapter(path))
        assert [*caught.value.keys] == keys
        assert not (tmp_path / "new").exists()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_save_that_ends_midway_leaves_nothing(error, fresh, source, tmp_path, monkeypatch):
    path = source("qwen3_moe-float32")
    params, adapter, calls = fmoe.load(path), fmoe.adapter(path), []
    if not fresh:
        fmoe.save(params, tmp_path / "new", adapter, "native", fsync=False)
    before = files(tmp_path)
    write = os.pwrite

    def failing(*args):
        calls.append(args)
        if len(calls) > 7:
            raise error
        return write(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(type(error)):
        fmoe.save(params, tmp_path / "new", adapter, max_shard_size=50_000, force=True)
    assert files(tmp_path) == before and (tmp_path / "new").exists() != fresh


def test_ranges_of_a_stack_are_not_saved_as_if_they_were_all(source, tmp_path):
    config, tensors = synthetic.qwen3_5_moe()
    adapter = fmoe.adapter("qwen3_5_moe", config, layout="per_expert")
    part = fmoe.load(source("synthetic-qwen3_5_moe"), e=range(2, 4))
    with pytest.raises(fmoe.AdapterError, match=r"expected \[6, ") as caught:
        fmoe.save(part, tmp_path / "new", adapter, fsync=False)
    assert caught.value.keys and {*caught.value.keys} <= {*part}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["qwen3_moe-bfloat16", "synthetic-qwen3_5_moe", "synthetic-deepseek_v3_fp8"])
def test_ranks_save_their_own_experts_and_no_part_is_taken_for_a_checkpoint(name, source, tmp_path):
    path = source(name)
    adapter = fmoe.adapter(path)
    experts = adapter.moe_config.n_routed_experts
    shares = {part: fmoe.load(path, e=part) for part in (range(0, 2), range(2, experts))}
    for part, params in shares.items():
        there = tmp_path / f"{part.start}"
        fmoe.save(params, there, adapter, "native", max_shard_size="100KB", e=part)
        same(fmoe.load(there), {n: t.contiguous() for n, t in params.items()})
        assert fmoe.verify(there).tensors == len(params)
        for write in (
            lambda to, there=there: fmoe.convert(there, to, "hf"),
            lambda to, params=params, part=part: fmoe.save(params, to, adapter, e=part),
            lambda to, part=part: fmoe.convert(path, to, "hf", dtype="float32", e=part),
        ):
            with pytest.raises(fmoe.AdapterError, match="would be a part of a Hugging Face checkpoint"):
                write(tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("other", [{"num_experts": 4}, {"hidden_size": 16}, {"model_type": "mixtral"}])
@pytest.mark.parametrize("how", [fmoe.save, fmoe.dcp.save])
def test_a_config_that_stays_is_of_these_parameters(tmp_path, how, other):
    config = {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 4, "moe_intermediate_size": 3}
    block = "model.layers.0.mlp.experts"
    params = {f"{block}.gate_and_up_projs": torch.ones(3, 4, 6), f"{block}.down_projs": torch.ones(3, 3, 4)}
    (tmp_path / "config.json").write_text(json.dumps(config | other))
    with pytest.raises(
        fmoe.AdapterError, match=rf"config.json stays.*{'model_type' if 'model_type' in other else 'expected'}"
    ):
        how(params, tmp_path, fmoe.adapter("qwen3_moe", config), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    how(params, tmp_path, fmoe.adapter("qwen3_moe", config))
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 7


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_tensors_whose_bytes_are_not_their_values_are_refused_by_name(layout, source, tmp_path):
    path = source("qwen3_moe-float32")
    params, key = fmoe.load(path), "model.norm.weight"
    wide = torch.complex(params[key], params[key]).conj()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(params[key])
    odd = {r"conjugate view.*resolve_conj\(\)": wide, r"negative view.*resolve_neg\(\)": wide.imag}
    for text, value in (
        odd | {"FakeTensor, of which no bytes": fake, "Deaf, of which no bytes": Deaf(params[key])}
    ).items():
        with pytest.raises(fmoe.AdapterError, match=text) as caught:
            fmoe.save(params | {key: value}, tmp_path / "new", fmoe.adapter(path), layout)
        assert caught.value.keys == (key,) and not (tmp_path / "new").exists()
    harmless = params[key].as_subclass(type("Harmless", (torch.Tensor,), {}))
    fmoe.save(params | {key: harmless}, tmp_path / "new", fmoe.adapter(path), layout, fsync=False)
    same(fmoe.load(tmp_path / "new"), params)


@pytest.mark.parametrize("threads", [0, -1, 2**31])
def test_no_number_of_threads_is_refused_by_every_call(threads, tmp_path):
    path = fmoe.docs.example()
    native = fmoe.load(path)
    calls = {
        "load": lambda: fmoe.load(path, threads=threads),
        "save": lambda: fmoe.save(native, tmp_path / "save", fmoe.adapter(path), threads=threads),
        "convert": lambda: fmoe.convert(path, tmp_path / "native", threads=threads),
        "between": lambda: fmoe.convert(path, tmp_path / "there", to="torchtitan", threads=threads),
    }
    for name, call in calls.items():
        with pytest.raises(fmoe.AdapterError, match=f"threads is {threads}, expected a positive int"):
            call()
        assert not [*tmp_path.iterdir()], name
