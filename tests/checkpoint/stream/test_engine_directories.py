"""Directories in jobs of any size: whole, in a range, by rank, there and back."""

import importlib
import json
from functools import cache, partial

import hf
import pytest
import torch
from directories import INDEX, ONE_DTYPE, files, fill, load

import fmoe
from fmoe.checkpoint import open_checkpoint, plan_from
from fmoe.checkpoint.stream.engine import Engine
from fmoe.testing import same


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    return cache(lambda name: fill(tmp_path_factory.mktemp(name), name))


@pytest.fixture
def limit(monkeypatch, request):
    module = importlib.import_module("fmoe.checkpoint.convert")
    monkeypatch.setattr(module, "Engine", partial(Engine, limit=request.param))
    return request.param


@pytest.mark.parametrize("name", ONE_DTYPE)
@pytest.mark.parametrize("limit", [3000], indirect=True)
def test_every_directory_in_small_jobs_on_four_threads(name, limit, hf_dir, tmp_path):
    source, tensors_ = hf_dir(name), load(hf_dir(name))
    adapter = fmoe.adapter(source)
    done = fmoe.convert(source, tmp_path / "native", threads=4, max_shard_size=70_000)
    same(load(tmp_path / "native"), {n: t.contiguous() for n, t in adapter.from_hf(tensors_).items()})
    assert done.written == sum(t.nbytes for t in load(tmp_path / "native").values())
    again = fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", threads=1)
    assert files(tmp_path / "back") == files(source) and again.written == done.nbytes
    assert done.read <= 1.02 * done.nbytes + 3000


RELAYOUT = {
    "qwen3_moe-bfloat16": "fused",
    "mixtral-float32": "fused",
    "deepseek_v3-bfloat16": "fused",
    "nemotron_h-bfloat16": "fused",
    "synthetic-qwen3_5_moe": "per_expert",
}


@pytest.mark.parametrize("name", RELAYOUT)
def test_one_layout_to_another_and_back_is_what_the_composed_adapter_gives(name, hf_dir, tmp_path):
    source, layout = hf_dir(name), RELAYOUT[name]
    opened = open_checkpoint(source)
    there = fmoe.adapter(source) >> fmoe.adapter(opened.model_type, opened.config, layout=layout).inverse
    done = fmoe.convert(source, tmp_path / "other", to="hf", layout=layout)
    expected = there.from_hf(load(source))
    same(load(tmp_path / "other"), expected)
    assert fmoe.inspect(tmp_path / "other")["layout"]["layout"] == layout
    assert done.read <= 1.02 * done.nbytes
    was = "per_expert" if layout == "fused" else "fused"
    fmoe.convert(tmp_path / "other", tmp_path / "back", to="hf", layout=was)
    same(load(tmp_path / "back"), load(source))
    fmoe.save(fmoe.load(source), tmp_path / "saved", fmoe.adapter(opened.model_type, opened.config, layout=layout))
    same(load(tmp_path / "saved"), expected)
    fmoe.convert(source, tmp_path / "native")  # and from the native one
    fmoe.convert(tmp_path / "native", tmp_path / "third", to="hf", layout=layout)
    same(load(tmp_path / "third"), expected)


@pytest.mark.parametrize("name", ONE_DTYPE)
def test_a_range_of_experts_is_that_slice_and_ranks_put_together_are_the_whole(name, hf_dir, tmp_path):
    source, whole = hf_dir(name), fmoe.adapter(hf_dir(name)).from_hf(load(hf_dir(name)))
    opened = open_checkpoint(source)
    stacks = fmoe.adapter(source).plan(opened.specs).stacks("e")
    n = next(iter(stacks.values())).shape[0]
    parts = [range(i, min(i + -(-n // 3), n)) for i in range(0, n, -(-n // 3))]
    made = []
    for i, part in enumerate(parts):
        done = fmoe.convert(source, tmp_path / str(i), e=part)
        made.append(load(tmp_path / str(i)))
        same(made[-1], {k: t[part.start : part.stop] if k in stacks else t for k, t in whole.items()})
        plan = fmoe.adapter(source).plan(opened.specs, e=part)
        assert done.made == len(plan.targets)
        owned = done.written
        assert owned == sum(t.nbytes for t in made[-1].values())
        stored = sum(opened.specs[s].nbytes for s in plan.sources) if "fp8" in name else owned  # decoded, it is more
        assert done.read <= 1.02 * stored
        same(fmoe.load(tmp_path / str(i)), made[-1])
    same({k: torch.cat([m[k] for m in made]) if k in stacks else t for k, t in made[0].items()}, whole)


def test_an_index_still_counts_when_a_range_is_taken(hf_dir, tmp_path):
    source = hf_dir("qwen3_moe-bfloat16")
    fmoe.convert(source, tmp_path / "part", e=range(2, 5), max_shard_size=20_000)
    index = json.loads((tmp_path / "part" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(tmp_path / "part").values())
    assert hf.OTHER_FILES.keys() <= files(tmp_path / "part").keys()
    fmoe.convert(source, tmp_path / "all", e=range(8))
    fmoe.convert(tmp_path / "all", tmp_path / "back", "hf")
    assert files(tmp_path / "back") == files(source)
    assert plan_from(open_checkpoint(tmp_path / "part"), fmoe.adapter(tmp_path / "part").inverse).nbytes
