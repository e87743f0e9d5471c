"""Our safetensors headers against the library's: the same bytes written, the same read, the same refused."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fmoe.checkpoint.files.directory import DTYPES, read_header
from fmoe.checkpoint.files.writer import Layout
from fmoe.checkpoint.stream.written import write_at
from fmoe.testing import same
from fmoe.types import AdapterError, TensorSpec, bits

NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
# two entries at most one: the library writes more of them in any order
METADATA = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.text(max_size=5), max_size=1)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes, NaN and all, as a tensor; booleans are 0 or 1."""
    size = TensorSpec(shape, dtype).nbytes
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape)


@given(
    specs=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(list(DTYPES.values()))), min_size=1), data=st.data()
)
@example(specs={f"w{i}": ((2, 1), dtype) for i, dtype in enumerate(DTYPES.values())}, data=None)
def test_files_are_the_librarys_byte_for_byte(specs, data):
    metadata = data.draw(METADATA) if data else {}
    tensors = {n: filled(shape, dtype, i) for i, (n, (shape, dtype)) in enumerate(specs.items())}
    order = data.draw(st.permutations(list(tensors))) if data else list(tensors)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs", Path(folder) / "ours"
        save_file(tensors, theirs, metadata or None)
        every = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
        layout = Layout.of(every, dict.fromkeys(every, "ours"), {"ours": metadata})
        head, size = layout.heads["ours"]
        with open(ours, "wb") as file:
            file.write(head)
            for name in order:  # transposed storage too: what counts is the order of the shape
                tensor = tensors[name].mT.contiguous().mT if tensors[name].ndim > 1 else tensors[name]
                file.flush()
                write_at(ours, file.fileno(), bits(tensor), layout.starts[name])
        assert ours.stat().st_size == size
        assert ours.read_bytes() == theirs.read_bytes()
        header = read_header(ours)
        assert header[:2] == (every, metadata)
        data = ours.read_bytes()
        for name, tensor in tensors.items():
            at = header.offsets[name]
            assert data[at : at + tensor.nbytes] == bits(tensor).numpy().tobytes()
        with safe_open(ours, framework="pt") as opened:
            same({n: opened.get_tensor(n) for n in opened.keys()}, tensors)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = ENTRY | {"data_offsets": [8, 16]}
HEADERS = {
    "one tensor": ({"a": ENTRY}, 8),
    "two, the later first": ({"b": NEXT, "a": ENTRY}, 16),
    "blanks around": (b'  {"a": ' + json.dumps(ENTRY).encode() + b"} \n ", 8),
    "no metadata": ({"__metadata__": None, "a": ENTRY}, 8),
    "an empty tensor at the end": ({"a": ENTRY, "b": {**ENTRY, "shape": [0], "data_offsets": [8, 8]}}, 8),
    "an empty tensor in front": ({"a": ENTRY, "b": {**ENTRY, "shape": [0], "data_offsets": [0, 0]}}, 8),
    "an empty tensor inside another": ({"a": ENTRY, "b": {**ENTRY, "shape": [0], "data_offsets": [4, 4]}}, 8),
    "no tensor": ({}, 0),
    "a byte too many": ({"a": ENTRY}, 9),
    "a byte too few": ({"a": ENTRY}, 7),
    "a hole": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, 20),
    "an overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12),
    "too long, and ending where it should": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [7, 16]}}, 16),
    "the same place twice": ({"a": ENTRY, "b": ENTRY}, 8),
    "not from the start": ({"a": NEXT}, 16),
    "too short for its shape": ({"a": {**ENTRY, "data_offsets": [0, 4]}}, 4),
    "negative sizes": ({"a": {**ENTRY, "shape": [-1, -2]}}, 8),
    "a fraction": ({"a": {**ENTRY, "shape": [2.0]}}, 8),
    "a boolean": ({"a": {**ENTRY, "shape": [True, 2]}}, 8),
    "an unknown dtype": ({"a": {**ENTRY, "dtype": "F33"}}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "three offsets": ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, 8),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": ENTRY}, 8),
    "metadata that is a list": ({"__metadata__": [1], "a": ENTRY}, 8),
    "a list": (b"[]", 0),
    "a number": (b"7", 0),
    "nothing": (b"", 0),
    "no JSON": (b"{", 0),
    "another encoding": (b'{"\xff": {}}', 0),
    "brackets without end": (b"[" * 100_000, 0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_read_or_refused_as_the_library_does(name, tmp_path):
    header, size = HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    agree(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + bytes(size))


@given(st.data())
def test_a_damaged_file_is_read_or_refused_as_the_library_does(data):
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    at, header = 0, {}
    for i, n in enumerate(sizes):
        header[f"w{i}"] = {"dtype": "F32", "shape": [n], "data_offsets": [at, at + 4 * n]}
        at += 4 * n
    for entry in header.values():
        where, by = (
            data.draw(st.sampled_from(["shape", "data_offsets"])),
            data.draw(st.sampled_from([0, 0, 0, 1, -4, 4])),
        )
        entry[where][-1] += by
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(at)
    with tempfile.TemporaryDirectory() as folder:
        cut = data.draw(st.sampled_from([len(whole), len(whole), len(whole) - 4, 20, 8, 7, 0]))
        agree(Path(folder) / "x.safetensors", whole[:cut])


@pytest.mark.parametrize("length", [2, 100_000_001, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_not_believed(length, tmp_path):
    path = tmp_path / "x.safetensors"
    if length == 100_000_001:  # one more than the library reads, and so much is there
        path.write_bytes(length.to_bytes(8, "little"))
        os.truncate(path, 8 + length)
    else:
        agree(path, length.to_bytes(8, "little") + b"{")
    with pytest.raises(AdapterError, match=f"has .* bytes, and its header would have {length:,}: cut short"):
        read_header(path)


def agree(path: Path, content: bytes) -> None:
    """Both read it alike, or both refuse it, ours naming the file."""
    path.write_bytes(content)
    try:
        with safe_open(path, framework="pt") as opened:
            theirs = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}
    except SafetensorError:
        with pytest.raises(AdapterError, match=re.escape(str(path))):
            read_header(path)
    else:
        assert {n: s.shape for n, s in read_header(path)[0].items()} == theirs
