"""Chunks too large to be held are laid out as streams: the same bytes for every form, and what is broken is refused."""

import json
import os

import numpy as np
import pytest
import torch
from grown import grown
from orbax_cases import saved
from system_directories import files, same
from systems_zoo import model

import fmoe
import fmoe.checkpoint.files.containers.orbax as orbax
import fmoe.checkpoint.files.containers.orbax_stream as orbax_stream
from fmoe import AdapterError

if not os.environ.get("CI"):
    pytest.importorskip("tensorstore")  # of the extra `test`: in CI they are there, or this fails
    pytest.importorskip("zstandard")
SHAPE = (5, 3, 7)
CHUNKS = [SHAPE, (5, 3, 4), (2, 3, 7), (2, 2, 2), (1, 3, 7), (8, 3, 9)]
"""Whole, of the last axis, of the first one, of all, that divide it, and larger than the array."""


def _values(dtype, shape=SHAPE):
    number = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.rand(shape, generator=number) < 0.5
    raw = torch.randint(0, 100, (*shape, dtype.itemsize), generator=number).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


def _unpacked(path, tensors):
    """Each tensor's bytes in the one file that the engine reads."""
    found = orbax.open_orbax(path, {})
    raw, size = found.raw(path), sum(t.nbytes for t in tensors.values())
    with found.unpacked(path.parent, raw, [(0, size)]):
        data = (path.parent / orbax.UNPACKED).read_bytes()
    assert len(data) == size and not (path.parent / orbax.UNPACKED).exists()
    return {n: data[raw.offsets[n] : raw.offsets[n] + t.nbytes] for n, t in tensors.items()}


def _bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def streamed(monkeypatch):
    """All chunks are too large, and blocks smaller than they; the words of those that were streamed."""
    words, laid = [], orbax_stream.laid
    monkeypatch.setattr(orbax, "WHOLE", 0)
    monkeypatch.setattr(orbax_stream, "BLOCK", 48)
    monkeypatch.setattr(orbax_stream, "laid", lambda array, word, *rest: (words.append(word), laid(array, word, *rest)))
    return words


ZSTD3 = {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]}
FORMS = {  # how, and whether it is a stream
    "zstd": (dict(), True),
    "zstd in files": (dict(ocdbt=False, record={"compressor": {"id": "zstd", "level": 19}}), True),
    "as they are": (dict(record={"compressor": None}), True),
    "zarr3 as they are": (dict(zarr3=True), True),
    "zarr3 zstd": (dict(zarr3=True, record=ZSTD3), True),
    "blosc": (dict(record={"compressor": {"id": "blosc"}}), False),
    "columns first": (dict(record={"order": "F"}), False),
    "big-endian": (dict(record={"dtype": ">f4"}), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bytes_in_every_form(form, tmp_path, streamed):
    how, stream = FORMS[form]
    for i, chunk in enumerate(CHUNKS):
        more = {} if form in ("big-endian", "columns first") or i else {n: getattr(torch, n) for n in orbax.DTYPES}
        tensors = {f"params-{n}": _values(d) for n, d in ({"float32": torch.float32} | more).items()}
        tensors["params-large"] = _values(torch.float32, (40, 33))
        if form != "columns first":
            tensors["params-none"] = torch.tensor(7.0)
        cut = lambda shape, chunk=chunk: chunk if len(shape) == 3 else [max(1, n // 2) for n in shape]
        saved(tmp_path / str(i) / "there", tensors, chunk=cut, **how)
        streamed.clear()
        found = _unpacked(tmp_path / str(i) / "there", tensors)
        assert found == {n: _bytes(t) for n, t in tensors.items()}, chunk
        assert bool(streamed) == stream


@pytest.mark.parametrize("fill", [None, 7.0])
def test_a_chunk_that_is_not_there_is_its_filling(fill, tmp_path, streamed):
    tensors = {"params-w": torch.full(SHAPE, fill or 0.0)}
    tensors["params-w"][0, 0, 0] = 3.0
    record = {"fill_value": fill, "dtype": "<f4"}
    path = saved(tmp_path / "there", tensors, chunk=lambda shape: (2, 2, 7), record=record, ocdbt=False)
    (path / "params.params.w" / "0.1.0").unlink(missing_ok=True)
    with pytest.raises(AdapterError, match="'params-w' lacks the chunks"):
        _unpacked(path, tensors)
    said = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(said.replace('equal_to_fill_value": true', 'equal_to_fill_value": false'))
    assert _unpacked(path, tensors) == {n: _bytes(t) for n, t in tensors.items()} and len(streamed) == 6


def _frame(data, **how):
    import zstandard

    return zstandard.ZstdCompressor(**how).compress(data)


BROKEN = {  # of a chunk's bytes, its value
    "cut by a byte": lambda data: _frame(data)[:-1],
    "cut in half": lambda data: _frame(data)[: len(_frame(data)) // 2],
    "cut by its checksum": lambda data: _frame(data, write_checksum=True)[:-4],
    "cut in its header": lambda data: _frame(data)[:3],
    "of no bytes": lambda data: b"",
    "of another number": lambda data: _frame(data, write_checksum=True)[:-1] + b"\0",
    "no frame": lambda data: b"x" + _frame(data)[1:],
    "a byte more": lambda data: _frame(data) + b"\1",
    "a frame more": lambda data: _frame(data) + _frame(b"\1"),
    "longer": lambda data: _frame(data + b"\1"),
    "shorter": lambda data: _frame(data[:-1]),
    "without end": lambda data: _frame(bytes(2**24)),
}
RAW = {
    "cut by a byte": lambda data: data[:-1],
    "of no bytes": lambda data: b"",
    "a byte more": lambda data: data + b"\1",
}
CASES = [("zstd", name, make) for name, make in BROKEN.items()] + [(None, name, make) for name, make in RAW.items()]


@pytest.mark.parametrize("kind,name,make", CASES)
def test_a_value_that_is_not_its_chunk_is_refused_by_name(kind, name, make, tmp_path, streamed):
    tensors = {"params-a": torch.arange(9.0), "params-w": _values(torch.float32)}
    record = {"compressor": kind and {"id": kind}}
    path = saved(tmp_path / "there", tensors, ocdbt=False, record=record, chunk=lambda shape: [4] * len(shape))
    data = bytes(4**3 * 4)
    chunk = path / "params.params.w" / "1.0.1"
    chunk.write_bytes(data if kind is None else _frame(data))
    assert _unpacked(path, tensors).keys() == tensors.keys()
    chunk.write_bytes(make(data))
    with pytest.raises(AdapterError, match="'params-w' cannot be read"):
        _unpacked(path, tensors)
    assert streamed[-1] == "1.0.1" and not (tmp_path / orbax.UNPACKED).exists()


def test_without_the_decompressor_a_chunk_is_held_whole(tmp_path, monkeypatch, streamed):
    tensors = {"params-w": _values(torch.float32)}
    path = saved(tmp_path / "there", tensors)
    assert orbax.open_orbax(path, {}).largest == 0
    monkeypatch.setattr(orbax_stream, "find_spec", lambda name: None)
    assert orbax.open_orbax(path, {}).largest == tensors["params-w"].nbytes
    assert _unpacked(path, tensors) == {"params-w": _bytes(tensors["params-w"])} and not streamed


def test_runs_of_a_chunk_are_the_array():
    values = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    for chunk in [(1, 2, 3), (2, 3, 4), (2, 3, 1), (1, 3, 4), (2, 1, 4), (3, 3, 4), (2, 3, 5)]:
        out = np.full(values.size, -1, np.int16)
        for first in np.ndindex(*(-(-n // c) for n, c in zip(values.shape, chunk, strict=True))):
            first = [i * c for i, c in zip(first, chunk, strict=True)]
            held = np.full(chunk, -1, np.int16)
            part = values[tuple(slice(f, f + c) for f, c in zip(first, chunk, strict=True))]
            held[tuple(map(slice, part.shape))] = part
            for here, there, count in orbax_stream.places(values.shape, chunk, first):
                out[there : there + count] = held.reshape(-1)[here : here + count]
        assert (out == values.reshape(-1)).all(), chunk
    assert list(orbax_stream.places((), (), ())) == [(0, 0, 1)]


def test_memory_is_bounded_where_every_array_is_one_chunk(tmp_path):
    config, tensors = map(dict, model("qwen3_moe alike"))
    rows = 40 * 2**20 // (4 * config["hidden_size"])
    tensors |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.randn(rows, config["hidden_size"]))
    config["vocab_size"] = rows
    adapter = fmoe.adapter("qwen3_moe", config, system="maxtext", scan=True)
    saved(tmp_path / "there", adapter.from_hf(tensors))
    (tmp_path / "there" / "config.json").write_text(json.dumps(config, default=str))
    (most,) = grown(("convert", tmp_path / "there", tmp_path / "back", {"fsync": False, "to": "hf"}))
    assert most <= 100, most
    same(files(tmp_path / "back"), tensors)
