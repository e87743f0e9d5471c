"""fmoe.save: what any reader reads back bit for bit, under the config that belongs to it."""

import json
from functools import cache

import hf
import pytest
import torch
import transformers
from directories import INDEX, ONE_DTYPE, files, fill
from directories import load as read
from safetensors import safe_open

import fmoe
from fmoe.checkpoint import open_checkpoint
from fmoe.testing import same

LOADS = ["qwen3_moe-bfloat16", "mixtral-float32", "qwen3_5_moe_text-float32", "gpt_oss-bfloat16", "deepseek_v3-float32"]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return cache(lambda name: fill(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("name", ONE_DTYPE)
def test_what_is_saved_is_what_was_there(name, source, tmp_path):
    path = source(name)
    adapter, tensors = fmoe.adapter(path), read(path)
    params = adapter.from_hf(tensors)
    report = fmoe.save(params, tmp_path / "hf", adapter, max_shard_size="70KB", fsync=False)
    same(read(tmp_path / "hf"), tensors)
    opened = open_checkpoint(tmp_path / "hf")  # strict: index and headers agree
    assert opened.config == json.loads((path / "config.json").read_text())
    assert (report.made, report.written) == (len(tensors), sum(t.nbytes for t in tensors.values()))
    assert report.files == len(set(opened.files.values()))
    held: dict[str, int] = {}
    for n, file in opened.files.items():
        held[file] = held.get(file, 0) + tensors[n].nbytes
    many = [file for file in held if list(opened.files.values()).count(file) > 1]
    assert all(held[file] <= 70_000 for file in many)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(held.values()) and index["weight_map"] == opened.files
    same(fmoe.load(tmp_path / "hf"), params)
    fmoe.save(params, tmp_path / "again", adapter, max_shard_size=70_000, threads=1, fsync=False)
    assert files(tmp_path / "again") == files(tmp_path / "hf")

    fmoe.save(params, tmp_path / "native", adapter, "native", 70_000, fsync=False)
    same(read(tmp_path / "native"), {n: t.contiguous() for n, t in params.items()})
    same(fmoe.load(tmp_path / "native"), params)
    fmoe.verify(tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    assert files(tmp_path / "back") == files(tmp_path / "hf")


@pytest.mark.parametrize("name", [n for n in hf.MODELS if n != "nemotron_h_latent"])
def test_a_file_is_the_very_one_that_transformers_writes(name, tmp_path):
    hf.write(name, tmp_path / "hf", torch.bfloat16, max_shard_size="5GB")
    adapter = fmoe.adapter(tmp_path / "hf")
    fmoe.save(fmoe.load(tmp_path / "hf"), tmp_path / "ours", adapter, fsync=False)
    theirs = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == theirs
    assert not (tmp_path / "ours" / INDEX).exists()


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("size", ["5GB", 50_000], ids=str)
def test_transformers_loads_what_was_saved(name, size, tmp_path):
    model = hf.write(name.rpartition("-")[0], tmp_path / "hf", getattr(torch, name.rpartition("-")[2]))
    fmoe.save(fmoe.load(tmp_path / "hf"), tmp_path / "new", fmoe.adapter(tmp_path / "hf"), "hf", size, fsync=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    same(again.state_dict(), model.state_dict())


def test_training_in_place_is_saved(source, tmp_path):
    path = source("qwen3_moe-float32")
    params = {n: torch.nn.Parameter(t) for n, t in fmoe.load(path).items()}
    sum(p.sum() for p in params.values()).backward()
    torch.optim.SGD(params.values(), lr=0.5).step()
    fmoe.save(params, tmp_path / "new", fmoe.adapter(path), fsync=False)
    same(read(tmp_path / "new"), {n: t - 0.5 for n, t in read(path).items()})
    assert all(p.requires_grad for p in params.values())


def test_a_weight_in_fp8_that_training_has_changed_gets_new_scales(source, tmp_path):
    path = source("synthetic-deepseek_v3_fp8")
    adapter, params = fmoe.adapter(path), fmoe.load(path, out=None)
    key = "model.layers.1.mlp.experts.down_projs"
    params[key] = torch.nn.Parameter(params[key] * 3)
    fmoe.save(params, tmp_path / "new", adapter, fsync=False)
    made, was = read(tmp_path / "new"), read(path)
    changed = {n for n in made if not torch.equal(made[n].view(torch.uint8), was[n].view(torch.uint8))}
    assert changed and all(n.startswith("model.layers.1.mlp.experts.") and "down_proj" in n for n in changed)
    assert torch.allclose(fmoe.load(tmp_path / "new")[key].float(), params[key].float(), rtol=2**-4, atol=1e-3)


def test_tensors_that_share_storage_or_lie_across_it_are_saved_by_value(source, tmp_path):
    path = source("synthetic-qwen3_5_moe")
    adapter, tensors = fmoe.adapter(path), read(path)
    params = adapter.from_hf(tensors)
    tied = params["lm_head.weight"]
    params["model.language_model.embed_tokens.weight"] = tied  # one storage, two names
    spread = {n: torch.stack([t, t], -1)[..., 0] for n, t in params.items()}
    whole = torch.randn(4, 64, 160).bfloat16()
    spread["lm_head.weight"] = whole[2]
    fmoe.save(params, tmp_path / "shared", adapter, fsync=False)
    same(read(tmp_path / "shared"), adapter.to_hf(params))
    for layout in ("hf", "native"):
        fmoe.save(spread, tmp_path / layout, adapter, layout, fsync=False)
        same(fmoe.load(tmp_path / layout), spread)


def test_the_config_is_the_adapters_or_the_one_that_is_there(source, tmp_path):
    path = source("mixtral-bfloat16")
    params, adapter = fmoe.load(path), fmoe.adapter(path)
    with pytest.raises(fmoe.AdapterError, match="which family.*config.json"):
        fmoe.save(params, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    text = (path / "config.json").read_text() + "\n\n"
    (tmp_path / "new" / "config.json").write_text(text)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    fmoe.save(params, tmp_path / "new", fsync=False)
    same(read(tmp_path / "new"), read(path))
    assert (tmp_path / "new" / "config.json").read_text() == text
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    fmoe.save(params, tmp_path / "none", fmoe.adapter("mixtral"), fsync=False)
    assert not (tmp_path / "none" / "config.json").exists()
    fmoe.save(params, tmp_path / "with", adapter, fsync=False)
    assert json.loads((tmp_path / "with" / "config.json").read_text()) == json.loads(text)


def test_every_dtype_that_a_file_can_hold_is_saved(tmp_path):
    from fmoe.checkpoint.files.directory import DTYPES

    params = {}
    for i, dtype in enumerate(DTYPES.values()):
        size = torch.tensor([], dtype=dtype).element_size()
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * size,), generator=torch.Generator())
        params |= {f"w.{i}": data.to(torch.uint8).view(dtype).view(2, 3), f"none.{i}": torch.empty(0, 3, dtype=dtype)}
        params |= {f"one.{i}": data[:size].to(torch.uint8).view(dtype).view(())}
    fmoe.save(params, tmp_path / "new", fmoe.keep("{rest}"), fsync=False)
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        same({n: opened.get_tensor(n) for n in opened.keys()}, params)
