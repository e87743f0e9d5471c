"""Directories of torch.distributed.checkpoint: chunks of any cut, and what lies or is hostile."""

import os
import pickle

import pytest
import torch
from system_directories import files, same, saved

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.containers import pickles
from fmoe.checkpoint.files.containers.torch_dcp import open_dcp

pytestmark = pytest.mark.filterwarnings("ignore")


def chunked(path, name, whole, boxes, edit=lambda m: None):
    """One tensor in several chunks, as ranks of a mesh write it."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata as Chunk
    from torch.distributed.checkpoint.metadata import MetadataIndex

    parts = {
        f"{i}": whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].clone() for i, box in enumerate(boxes)
    }
    saved(path, parts)
    meta = pickle.loads((path / ".metadata").read_bytes())
    one = meta.state_dict_metadata["0"]
    one.size, one.chunks = whole.shape, [Chunk(torch.Size(o), torch.Size(n)) for o, n in boxes]
    stored = {index.fqn: info for index, info in meta.storage_data.items()}
    meta.storage_data = {MetadataIndex(name, torch.Size(o), i): stored[str(i)] for i, (o, n) in enumerate(boxes)}
    meta.state_dict_metadata = {name: one}
    edit(meta)
    (path / ".metadata").write_bytes(pickle.dumps(meta))
    return path


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_are_read_whichever_python_wrote_them(module):
    written = f"c{module}\nPosixPath\n(S'/a'\ntR.".encode()  # 3.13 names the second, every other Python the first
    assert isinstance(pickles.read(written, "it"), pickles.Record)


BOXES = [((0, 0), (3, 4)), ((0, 4), (3, 2)), ((3, 0), (3, 6))]


def test_chunks_of_any_cut_are_put_together(tmp_path):
    from fmoe.checkpoint.files.containers.source import open_foreign

    whole = torch.arange(36.0).view(6, 6)
    source = open_foreign(chunked(tmp_path / "d", "w", whole, BOXES), {})
    assert torch.equal(source.read(["w"])["w"], whole)


def test_a_sharded_model_converts_through_the_engine(hf, tmp_path):
    path, config, tensors = hf("qwen3_moe alike")
    theirs = fmoe.adapter("qwen3_moe", config, system="torchtitan").from_hf(tensors)
    halves = {}
    for name, t in theirs.items():
        halves |= {f"{name}@{i}": part.clone() for i, part in enumerate(t.chunk(2, 0))}
    titan = saved(tmp_path / "titan", halves)
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata as Chunk
    from torch.distributed.checkpoint.metadata import MetadataIndex

    meta = pickle.loads((titan / ".metadata").read_bytes())
    stored = {index.fqn: info for index, info in meta.storage_data.items()}
    listed, places = {}, {}
    for name, t in theirs.items():
        one, at = meta.state_dict_metadata[f"{name}@0"], 0
        one.size, one.chunks = t.shape, []
        for i, part in enumerate(t.chunk(2, 0)):
            offset = torch.Size([at] + [0] * (t.ndim - 1))
            one.chunks.append(Chunk(offset, part.shape))
            places[MetadataIndex(name, offset, i)] = stored[f"{name}@{i}"]
            at += part.shape[0]
        listed[name] = one
    meta.state_dict_metadata, meta.storage_data = listed, places
    (titan / ".metadata").write_bytes(pickle.dumps(meta))
    fmoe.convert(titan, tmp_path / "back", to="hf", config=config)
    same(files(tmp_path / "back"), tensors)


class Evil:
    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return (os.system, (f"touch {self.name}",))


def test_a_pickle_with_foreign_names_is_refused_and_nothing_runs(tmp_path):
    saved(tmp_path / "d", {"w": torch.ones(2)})
    (tmp_path / "d" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(AdapterError, match=r"posix.system|os.system"):
        open_dcp(tmp_path / "d")
    dotted = b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x04true\x85R."
    with pytest.raises(AdapterError, match="filesystem.os.system: refused"):
        pickles.read(dotted, "x")
    for module, name in (
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch", "os.system"),
    ):
        data = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
        with pytest.raises(AdapterError, match="refused"):
            pickles.read(data, "x", tensors=True)
    assert not (tmp_path / "ran").exists()


def _move(meta, **what):
    info = next(iter(meta.storage_data.values()))
    for name, value in what.items():
        setattr(info, name, value)


def _properties(meta):
    return meta.state_dict_metadata["w"].properties


def _both(meta):
    """Two chunks in one item."""
    infos = list(meta.storage_data.values())
    infos[1].offset, infos[1].length = infos[0].offset, infos[0].length


HOSTILE = {
    "two chunks in one item": (_both, "'w' and 'w' share bytes of __0_0.distcp"),
    "an item behind the end": (lambda m: _move(m, offset=10**9), "'w'.*behind the file"),
    "an item elsewhere": (lambda m: _move(m, relative_path="../w"), "'w' lies in"),
    "an item inside another": (lambda m: _move(m, offset=7), "'w' and 'w' share bytes"),
    "a compressed item": (lambda m: _move(m, transform_descriptors=["zstd"]), "'w' is stored transformed"),
    "a missing chunk": (lambda m: m.state_dict_metadata["w"].chunks.pop(), "'w'.*missing, or overlap"),
    "a missing place": (lambda m: m.storage_data.pop(next(iter(m.storage_data))), "'w' at .* is in no file"),
    "overlap": (lambda m: setattr(m.state_dict_metadata["w"].chunks[2], "offsets", torch.Size([2, 0])), "'w'"),
    "another dtype of the width": (lambda m: setattr(_properties(m), "dtype", torch.int32), "'w'.*float32, expected"),
    "another dtype": (lambda m: setattr(_properties(m), "dtype", torch.float64), "'w'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_directory_that_lies_is_refused_by_name(tmp_path, what):
    edit, match = HOSTILE[what]
    path = chunked(tmp_path / "d", "w", torch.arange(36.0).view(6, 6), BOXES, edit)
    with pytest.raises(AdapterError, match=match):
        open_dcp(path)


def test_two_tensors_in_one_item_are_refused(tmp_path):
    path = saved(tmp_path / "d", {"a": torch.ones(4), "b": torch.zeros(4)})
    meta = pickle.loads((path / ".metadata").read_bytes())
    one, two = meta.storage_data
    meta.storage_data[two] = meta.storage_data[one]
    (path / ".metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(AdapterError, match="'a' and 'b' share bytes"):
        open_dcp(path)


def test_a_truncated_file_is_refused_and_nothing_written(hf, tmp_path):
    path, config, _ = hf("qwen3_moe alike")
    fmoe.convert(path, tmp_path / "there", to="torchtitan")
    file = tmp_path / "there" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="behind the file"):
        fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_native_tensors_that_torch_saved_are_known_by_their_names(name, hf, tmp_path):
    path, config, tensors = hf(name)
    saved(tmp_path / "step", {n: t.contiguous() for n, t in fmoe.load(path).items()})
    report = fmoe.convert(tmp_path / "step", tmp_path / "out", to="hf", config=config)
    assert "automodel" in report.sides
    same(files(tmp_path / "out"), tensors)


def test_what_is_not_contiguous_says_what_to_save(hf, tmp_path):
    path, config, _ = hf("qwen3_moe")
    saved(tmp_path / "step", fmoe.load(path))
    with pytest.raises(AdapterError, match=r"is not contiguous: strides .*Fix: save what tensor.contiguous\(\) gives"):
        fmoe.inspect(tmp_path / "step", config=config)
