"""Directories: HF -> native -> HF gives back every file byte for byte (in how much memory: `test_memory`)."""

import json
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hf
import pytest
import torch
import transformers
from directories import INDEX, SOURCES, files, fill, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.layout.pipeline import Plan
from fmoe.testing import same

FUSED = {"synthetic-qwen3_5_moe", "synthetic-qwen3_5_moe_split_mtp", "synthetic-qwen3_5_moe_no_mtp"}
NORM = "model.norm.weight"
NO_CHOICE = {"gpt_oss-float32", "gpt_oss-bfloat16", "synthetic-step3p5"}
NO_MTP = {"deepseek_v3-float32", "deepseek_v3-bfloat16"}  # Transformers' class has no such layers, its config counts 1
AHEAD = "num_nextn_predict_layers"
NO_AHEAD = "and no tensor is of such a layer (model.layers.3 or mtp): MTP is absent"
SIZES = {
    "E": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "K": ("num_experts_per_tok", "moe_top_k"),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """A source's directory, which several tests share: none writes into it."""
    return cache(lambda name: fill(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_comes_back_byte_for_byte(name, written, tmp_path):
    source, native, back = written(name), tmp_path / "native", tmp_path / "back"
    before, told = files(source), []
    made = fmoe.convert(source, native, max_shard_size=60_000, progress=lambda done, of: told.append((done, of)))
    again = fmoe.convert(native, back, "hf")
    assert files(back) == before == files(source)
    assert (made.tensors, made.made) == (again.made, again.tensors) == (len(load(source)), len(load(native)))
    assert told[0] == (0, made.nbytes) and told[-1] == (made.nbytes, made.nbytes) and told == sorted(told)
    other = {n for n in before if not n.endswith(".safetensors") and n != INDEX}
    assert {"config.json", *hf.OTHER_FILES} <= other
    assert {n: b for n, b in files(native).items() if n in other} == {n: before[n] for n in other}


@pytest.mark.parametrize("name", SOURCES)
def test_both_forms_verify(name, written, tmp_path):
    fmoe.convert(written(name), tmp_path / "native")
    for path in (written(name), tmp_path / "native"):
        before = files(path)
        found = fmoe.verify(path)
        assert (found.tensors, found.nbytes) == (len(load(path)), sum(t.nbytes for t in load(path).values()))
        assert files(path) == before


@pytest.mark.parametrize("name", SOURCES)
def test_inspect_says_what_is_there(name, written, tmp_path):
    source, tensors = written(name), load(written(name))
    fmoe.convert(source, tmp_path / "native")
    config = json.loads((source / "config.json").read_text())
    sizes = config.get("text_config", config)
    E, K = (next(sizes[n] for n in names if n in sizes) for names in SIZES.values())
    blocks = {n.partition(".moe.")[0] for n in tensors if ".moe." in n}
    blocks |= {n.partition(".experts.")[0] for n in tensors if ".experts." in n}
    stacked = [n for n in tensors if ".experts." in n or ".moe.gate_proj" in n or ".moe.up" in n or ".moe.down" in n]
    absent = [f"config.json has {AHEAD} {sizes[AHEAD]}, {NO_AHEAD}"] if name in NO_MTP else []
    found, native = fmoe.inspect(source), fmoe.inspect(tmp_path / "native")
    for form in (found, native):
        assert form["model_type"] == config["model_type"] and form["problems"] == []
        assert form["experts"]["layers"] == len(blocks)
        assert {shape[0] for shape in form["experts"]["shapes"].values()} == {E}
        layout = None if name in NO_CHOICE else "fused" if name in FUSED else "per_expert"
        assert form["layout"].get("layout") == layout
        assert form["layout"] == found["layout"] and form["rules"] == found["rules"]
        if name == "synthetic-step3p5":  # its shared experts are clamped after silu: MoEConfig cannot say it
            assert form["moe_config"] is None and "swiglu_limits" in form["notes"][0]
        else:
            assert (form["moe_config"]["n_routed_experts"], form["moe_config"]["n_activated_experts"]) == (E, K)
            assert form["notes"] == absent
    assert (found["format"], native["format"]) == ("hf", "native")
    assert found["lossless"] == ("fp8" not in name)
    assert (found["tensors"], found["files"]) == (len(tensors), len(list(source.glob("*.safetensors"))))
    assert found["bytes"] == sum(t.nbytes for t in tensors.values()) == sum(found["dtypes"].values())
    assert found["experts"]["bytes"] == sum(tensors[n].nbytes for n in stacked)
    assert found["dtypes"].keys() == {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    json.dumps(found), json.dumps(native)


@pytest.mark.parametrize("size, count", [(1, None), (40_000, None), (200_000, 2), (10**9, 1)])
def test_native_files_are_plain_safetensors_within_the_shard_size(size, count, written, tmp_path):
    source = written("qwen3_moe-float32")
    fmoe.convert(source, tmp_path, max_shard_size=size)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    expected, where = fmoe.adapter(source).from_hf(load(source)), {}
    for file in names:
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            where |= dict.fromkeys(opened.keys(), file)
            held = [expected[n].nbytes for n in opened.keys()]
        assert sum(held) <= size or len(held) == 1
    same(load(tmp_path), {n: t.contiguous() for n, t in expected.items()})
    assert len(names) == (count or len(names)) and (size > 1 or len(names) == len(expected))
    if len(names) == 1:
        assert names == ["model.safetensors"] and not (tmp_path / INDEX).exists()
    else:
        assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
        index = {"metadata": {"total_size": sum(t.nbytes for t in expected.values())}, "weight_map": where}
        assert (tmp_path / INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"


def test_transformers_loads_what_came_back(tmp_path):
    model = hf.write("qwen3_moe", tmp_path / "hf")
    fmoe.convert(tmp_path / "hf", tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", experts_implementation="eager")
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


def test_more_shards_than_files_that_may_be_open(written, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 12, hard))
    try:
        fmoe.convert(written("qwen3_moe-float32"), tmp_path, max_shard_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(tmp_path.glob("*.safetensors"))) > 30


def test_a_cache_of_links_without_index_with_folders_and_odd_files_comes_back(written, tmp_path):
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"  # as a Hugging Face cache
    (blobs / "assets").mkdir(parents=True)
    shards = sorted(written("mixtral-bfloat16").glob("*.safetensors"))
    for i, shard in enumerate(shards):  # no index, names of another kind, metadata of its own
        save_file(load_file(shard), blobs / f"part{i}.safetensors", {"note": "é\n" * i} if i else None)
    (blobs / "config.json").write_bytes((shards[0].parent / "config.json").read_bytes().replace(b"\n", b"\r\n"))
    (blobs / "chat_template.jinja").write_bytes(b"\xff\x00\r\n")
    (blobs / "assets" / "a.txt").write_text("a")
    (source / "assets").mkdir(parents=True)
    for file in files(blobs):
        (source / file).symlink_to(blobs / file)
    fmoe.convert(source, tmp_path / "native", max_shard_size=50_000)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    assert files(tmp_path / "back") == files(blobs)
    for file in ("pytorch_model.bin", "old.safetensors.part"):
        (source / file).write_bytes(b"weights")
    (source / ".gitattributes").write_text("x")
    report = fmoe.convert(source, tmp_path / "clean")
    assert report.notes == ("not taken along: '.gitattributes', 'old.safetensors.part'",)
    assert files(tmp_path / "clean").keys() == {
        "config.json",
        "pytorch_model.bin",
        "chat_template.jinja",
        "assets/a.txt",
        "fmoe.json",
        "model.safetensors",
    }


def test_an_index_is_as_it_was_to_the_byte_unless_the_sizes_changed(tmp_path):
    source = fill(tmp_path / "hf", "synthetic-deepseek_v3")
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_bytes(json.dumps(index | {"metadata": {"total_size": 7, "é": 1}}).encode() + b"\r\n")
    fmoe.convert(source, tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    assert files(tmp_path / "back") == files(source)
    fmoe.convert(source, tmp_path / "wide", dtype=torch.float32)
    fmoe.convert(tmp_path / "wide", tmp_path / "wider", "hf")
    expected = {n: t.float() if ".mlp.experts." in n else t for n, t in load(source).items()}
    same(load(tmp_path / "wider"), expected)
    total = sum(t.nbytes for t in expected.values())
    assert json.loads((tmp_path / "wider" / INDEX).read_text()) == index | {"metadata": {"total_size": total}}


def test_verify_compares_bits_and_names_what_differs(tmp_path, monkeypatch):
    source = fill(tmp_path, "qwen3_moe-float32")
    shard = source / json.loads((source / INDEX).read_text())["weight_map"][NORM]
    tensors = load_file(shard)
    tensors[NORM][0], tensors[NORM][1] = 0.0, torch.nan
    save_file(tensors, shard, {"format": "pt"})
    fmoe.verify(source)
    run = Plan.run

    def negate(self, params, only=None, **how):
        found = run(self, params, only, **how)
        return found | {n: torch.where(t == 0, -0.0, t) for n, t in found.items() if n == NORM}

    monkeypatch.setattr(Plan, "run", negate)
    with pytest.raises(fmoe.AdapterError, match=f"^'{NORM}' comes back with other bits$"):
        fmoe.verify(source)


OTHER = fmoe.alias("other.weight", of=NORM).choose(**{"other.weight": "present"})
LOSSY = {
    r"does not come back: dropped by your rule drop\('model.norm.weight', because='a test'\)": fmoe.drop(
        NORM, because="a test"
    )
    | fmoe.keep("{rest}"),
    "comes back, and was not there": OTHER | fmoe.keep("{rest}"),
}


@pytest.mark.parametrize("problem", LOSSY)
def test_verify_names_what_is_lost_or_made_up(problem, written):
    with pytest.raises(fmoe.AdapterError, match=f"^'({NORM}|other.weight)' {problem}$"):
        fmoe.verify(written("qwen3_moe-float32"), adapter=LOSSY[problem])


WRONG_ORIGIN = [{"weight_map": names} for names in ([], {"a": 1}, {"a": "../x.safetensors"}, {"a": "config.json"})]
WRONG_ORIGIN += [{"metadata": 1}, {"index": 1}, {"bytes": "1"}, {"bytes": None}]


@pytest.mark.parametrize("wrong", WRONG_ORIGIN, ids=str)
def test_a_native_directory_must_say_what_it_was_made_from(wrong, written, tmp_path):
    fmoe.convert(written("qwen3_moe-float32"), tmp_path / "native")
    origin = tmp_path / "native" / "fmoe.json"
    origin.write_text(json.dumps(json.loads(origin.read_text()) | wrong))
    with pytest.raises(fmoe.AdapterError, match="fmoe.json"):
        fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()
