"""MaxText's directories: there and back, compressed and in any chunks; and broken ones, refused by name."""

import json
import os
import sys

import pytest
import torch
from orbax_cases import saved
from safetensors.torch import save_file
from system_directories import files, same
from systems_zoo import model

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers.orbax import UNPACKED, Orbax, open_orbax

if not os.environ.get("CI"):
    pytest.importorskip("tensorstore")  # of the extra `test`: in CI it is there, or this fails
MODELS = [("qwen3_moe alike", False), ("qwen3_moe alike", True), ("deepseek_v3", True), ("gpt_oss", True)]
EMBED = "params-token_embedder-embedding"
KEY = "params.params.token_embedder.embedding"


@pytest.mark.parametrize("name,scan", MODELS)
def test_there_and_back(hf, tmp_path, name, scan):
    path, config, tensors = hf(name)
    report = fmoe.convert(path, tmp_path / "there", to="maxtext", scan=scan, fsync=False)
    want = fmoe.adapter(config["model_type"], config, system="maxtext", scan=scan).from_hf(tensors)
    found = open_orbax(tmp_path / "there", config)
    same(found.read(want), {n: t.contiguous() for n, t in want.items()})
    assert "maxtext (Orbax" in report.sides and report.made == len(want)
    back = fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    same(files(tmp_path / "back"), tensors)
    assert back.sides.startswith("maxtext (Orbax") and not list((tmp_path / "back").glob("*.part"))
    assert fmoe.verify(tmp_path / "there").tensors == len(want)
    assert fmoe.inspect(tmp_path / "there")["format"] == "maxtext"


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
def test_compressed_arrays_in_any_chunks_go_to_a_third(hf, tmp_path, ocdbt, zarr3):
    path, config, tensors = hf("qwen3_moe alike")
    want = fmoe.adapter("qwen3_moe", config, system="maxtext", scan=True).from_hf(tensors)
    noise = {"opt_state.mu": torch.ones(3), "step": torch.ones(1)}
    cut = lambda shape: [max(1, -(-n // 2)) for n in shape]
    theirs = saved(tmp_path / "0" / "items", want, ocdbt=ocdbt, zarr3=zarr3, chunk=cut, more=noise)
    with pytest.raises(AdapterError, match="--config"):
        fmoe.convert(theirs, tmp_path / "no", to="hf")
    report = fmoe.convert(tmp_path / "0", tmp_path / "titan", to="torchtitan", config=path)
    assert "'opt_state.mu', 'step'" in " ".join(report.notes)
    fmoe.convert(tmp_path / "titan", tmp_path / "back", to="hf")
    same(files(tmp_path / "back"), tensors)


def test_large_arrays_are_written_in_chunks_of_their_first_axis(hf, tmp_path, monkeypatch):
    import fmoe.checkpoint.files.containers.orbax_written as written

    path, config, tensors = hf("qwen3_moe alike")
    monkeypatch.setattr(written.chunked, "__defaults__", (600,))
    fmoe.convert(path, tmp_path / "there", to="maxtext", scan=True, fsync=False)
    count = len(list((tmp_path / "there" / "params.params.decoder.layers.moe_block.wi_0").iterdir()))
    assert count == 1 + tensors["model.layers.0.mlp.gate.weight"].shape[0]
    again = fmoe.convert(path, tmp_path / "there", to="maxtext", force=True, fsync=False)
    assert any("of the former model, removed" in n for n in again.notes)
    assert not (tmp_path / "there" / "params.params.decoder.layers.moe_block.wi_0").exists()
    fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    same(files(tmp_path / "back"), tensors)


def test_without_the_driver_the_extra_is_named(hf, tmp_path, monkeypatch):
    path, _, _ = hf("qwen3_moe alike")
    fmoe.convert(path, tmp_path / "there", to="maxtext", fsync=False)  # writing takes none
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match=r'pip install "fmoe\[orbax\]"'):
        fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not (tmp_path / "back").exists()


def _tree(path, edit):
    said = json.loads((path / "_METADATA").read_text())
    edit(said["tree_metadata"])
    (path / "_METADATA").write_text(json.dumps(said))


def _record(path, **what):
    file = path / KEY / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | what))


def _embed(tree, part):
    return next(e for k, e in tree.items() if "embedding" in k)[part]


HOSTILE = {
    "no array": (lambda p: [f.unlink() for f in (p / KEY).iterdir()], "embedding.*no array"),
    "no chunk": (lambda p: (p / KEY / "0.0").unlink(), "embedding.*lacks the chunks '0.0'"),
    "another chunk": (lambda p: (p / KEY / "0.0").rename(p / KEY / "0.7"), "embedding.*lacks the chunks '0.0'"),
    "a chunk cut short": (lambda p: os.truncate(p / KEY / "0.0", 100), "embedding.*cannot be read"),
    "another dtype": (lambda p: _record(p, dtype="<f8"), "embedding.*cannot be read"),
    "a dtype of no name": (lambda p: _record(p, dtype="|b1"), "embedding.*cannot be read"),
    "another shape": (lambda p: _record(p, shape=[7, 7], chunks=[7, 7]), "embedding.*(cannot be read|not whole)"),
    "other chunks": (lambda p: _record(p, chunks=[3, 3]), "embedding.*lacks the chunks"),
    "chunks without end": (lambda p: _record(p, shape=[10**9, 10**9], chunks=[1, 1]), "embedding.*lacks the chunks"),
    "a record that is none": (lambda p: (p / KEY / ".zarray").write_text("{"), "embedding.*cannot be read"),
    "a foreign array": (lambda p: os.rename(p / KEY, p / "params.params.other"), "embedding.*no array"),
    "a foreign key": (lambda p: _tree(p, lambda t: t.pop(next(k for k in t if "embedding" in k))), "does not name"),
    "a path that leads out": (
        lambda p: _tree(p, lambda t: _embed(t, "key_metadata")[-1].update(key="../x")),
        "no path",
    ),
    "a text": (lambda p: _tree(p, lambda t: _embed(t, "value_metadata").update(value_type="str")), "'str'"),
    "no tree": (lambda p: (p / "_METADATA").write_text("{}"), "no tree_metadata"),
    "no JSON": (lambda p: (p / "_METADATA").write_text("{"), "no JSON"),
    "a link": (lambda p: os.symlink("/etc/passwd", p / KEY / "0.1"), "is a link"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    config, tensors = model("qwen3_moe alike")
    path, there = tmp_path_factory.mktemp("orbax"), tmp_path_factory.mktemp("written") / "there"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    fmoe.convert(path, there, to="maxtext", scan=True, fsync=False)
    return there


@pytest.mark.parametrize("what", HOSTILE)
def test_a_directory_that_lies_is_refused_by_name_and_nothing_is_written(written, tmp_path, what):
    import shutil

    edit, match = HOSTILE[what]
    shutil.copytree(written, tmp_path / "d")
    edit(tmp_path / "d")
    with pytest.raises(AdapterError, match=f"(?s){match}"):
        fmoe.convert(tmp_path / "d", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_a_store_cut_short_is_refused(tmp_path):
    config, tensors = model("qwen3_moe alike")
    theirs = saved(tmp_path / "d", fmoe.adapter("qwen3_moe", config, system="maxtext").from_hf(tensors))
    largest = max((p for p in theirs.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(AdapterError, match="cannot be read"):
        fmoe.convert(theirs, tmp_path / "out", to="hf", config=config)
    assert not (tmp_path / "out").exists()


def compressed(path, **how):
    """A directory in which every array is compressed, its config, and its tensors as Hugging Face has them."""
    config, tensors = model("qwen3_moe alike")
    theirs = fmoe.adapter("qwen3_moe", config, system="maxtext", scan=True).from_hf(tensors)
    saved(path, theirs, **how)
    (path / "config.json").write_text(json.dumps(config, default=str))
    return config, tensors


def test_what_is_unpacked_goes_whatever_happens(tmp_path, monkeypatch):
    compressed(tmp_path / "there")
    import fmoe.checkpoint.between as between

    def stopped(*_):
        assert (tmp_path / "back" / UNPACKED).stat().st_size
        raise KeyboardInterrupt

    monkeypatch.setattr(between, "carry_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not (tmp_path / "back" / UNPACKED).exists()
    monkeypatch.undo()
    fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not list((tmp_path / "back").glob("*.part"))


def test_of_a_range_of_experts_only_their_chunks_are_decompressed(tmp_path, monkeypatch):
    config, tensors = compressed(tmp_path / "there", chunk=lambda shape: [1, *shape[1:]] if len(shape) == 4 else shape)
    (tmp_path / "hf").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config, default=str))
    taken, take = [], Orbax._take
    monkeypatch.setattr(Orbax, "_take", lambda self, name, box, into: (taken.append(name), take(self, name, box, into)))
    fmoe.convert(tmp_path / "there", tmp_path / "part", e=range(2, 5))
    assert [n.rpartition("-")[2] for n in taken if "wi_" in n or "wo" in n].count("wi_0") == 3
    fmoe.convert(tmp_path / "hf", tmp_path / "want", e=range(2, 5))
    same(files(tmp_path / "part"), files(tmp_path / "want"))
    assert fmoe.verify(tmp_path / "there").made
