"""Broken and hostile checkpoints are refused with the file, the key and the reason, at once; what is sound is read.

Headers go to the safetensors library too: what it refuses we refuse, and the few things in which we are stricter are
marked so. Directories that are wrong in simpler ways are in `test_checkpoint_refusals`.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIG, INDEX, NATIVE, bases, lay

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.directory import Checkpoint, open_checkpoint, read_header
from fmoe.checkpoint.files.fit import layers_fit
from fmoe.testing import same

STRICTER = "the library reads it"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = ENTRY | {"data_offsets": [8, 16]}
WHOLE = "expected at most 64 whole numbers from 0 to 2\\*\\*63"
PLACE = "expected two whole numbers: where it begins and ends"


def one(**fields: Any) -> dict[str, Any]:
    return {"w": ENTRY | fields}


HEADERS: dict[str, tuple[Any, int, str] | tuple[Any, int, str, str]] = {
    "negative size": (one(shape=[-2]), 8, rf"'w' has shape \[-2\], {WHOLE}"),
    "negative sizes that multiply to the right one": (one(shape=[-1, -2]), 8, rf"'w' has shape \[-1, -2\], {WHOLE}"),
    "fraction": (one(shape=[2.0]), 8, rf"'w' has shape \[2.0\], {WHOLE}"),
    "exponent": (b'{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', 8, rf"'w' has shape \[2.0\], {WHOLE}"),
    "minus zero": (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8, "-0 is no whole number"),
    "boolean size": (one(shape=[True, 2]), 8, rf"'w' has shape \[True, 2\], {WHOLE}"),
    "size in words": (one(shape=["2"]), 8, rf"'w' has shape \['2'\], {WHOLE}"),
    "size of 64 bits": (one(shape=[2**64 + 2]), 8, rf"'w' has shape .*, {WHOLE}"),
    "a million billions": (
        one(shape=[10**9] * 3),
        8,
        "'w' lies at 0:8, expected 4,000,000,000,000,000,000,000,000,000",
    ),
    "sizes whose product overflows to 8": (one(shape=[2**32, 2**32 + 0, 2]), 8, "'w' lies at 0:8, expected "),
    "sizes whose bytes overflow to 0": (one(shape=[2**62], data_offsets=[0, 0]), 0, "'w' lies at 0:0, expected 18,44"),
    "number of 400 digits": (one(shape=[10**400]), 8, rf"'w' has shape .*, {WHOLE}"),
    "number of 5000 digits": (b'{"w":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), 8, "digits"),
    "70 dimensions": (one(shape=[1] * 70, data_offsets=[0, 4]), 4, rf"'w' has shape .*, {WHOLE}", STRICTER),
    "empty and too wide": (one(shape=[0, 2**62, 4], data_offsets=[0, 0]), 0, "'w' has shape .* strides", STRICTER),
    "empty and overflowing": (one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), 0, "'w' has shape .* strides"),
    "shape in words": (one(shape="2"), 8, rf"'w' has shape '2', {WHOLE}"),
    "no shape": (one(shape=None), 8, rf"'w' has shape None, {WHOLE}"),
    "shape in shape": (one(shape=[[2]]), 8, rf"'w' has shape \[\[2\]\], {WHOLE}"),
    "negative place": (one(data_offsets=[-8, 0]), 8, rf"'w' has data_offsets \[-8, 0\], {PLACE}"),
    "fraction of a place": (one(data_offsets=[0, 8.0]), 8, rf"'w' has data_offsets \[0, 8.0\], {PLACE}"),
    "boolean place": (one(data_offsets=[False, 8]), 8, rf"'w' has data_offsets \[False, 8\], {PLACE}"),
    "three places": (one(data_offsets=[0, 8, 8]), 8, rf"'w' has data_offsets \[0, 8, 8\], {PLACE}"),
    "no place": (one(data_offsets=None), 8, rf"'w' has data_offsets None, {PLACE}"),
    "ends before it begins": (one(data_offsets=[8, 0]), 8, "'w' begins at 8, a hole after the header, expected 0"),
    "place beyond the file": (one(data_offsets=[2**40, 2**40 + 8]), 8, "'w' begins at 1,099,511,627,776, a hole"),
    "place beyond 64 bits": (one(data_offsets=[2**64, 2**64 + 8]), 8, rf"'w' has data_offsets .*, {PLACE}"),
    "longer than its shape": (one(data_offsets=[0, 12]), 12, r"'w' lies at 0:12, expected 8 bytes, as F32 \[2\] has"),
    "shorter than its shape": (one(data_offsets=[0, 4]), 4, r"'w' lies at 0:4, expected 8 bytes, as F32 \[2\] has"),
    "overlap": ({"w": ENTRY, "v": ENTRY | {"data_offsets": [4, 12]}}, 12, "'v' begins at 4, inside 'w', expected 8"),
    "the same place twice": ({"w": ENTRY, "v": ENTRY}, 8, "'w' begins at 0, inside 'v', expected 8"),
    "hole": (
        {"w": ENTRY, "v": ENTRY | {"data_offsets": [12, 20]}},
        20,
        "'v' begins at 12, a hole after 'w', expected 8",
    ),
    "hole in front": (one(data_offsets=[8, 16]), 16, "'w' begins at 8, a hole after the header, expected 0"),
    "bytes after the last": (one(), 9, r"has 7\d bytes, its header says 7\d: no tensor has the rest"),
    "bytes missing": (one(), 7, r"has 7\d bytes, its header says 7\d: cut short: download or copy it again"),
    "unknown dtype": (one(dtype="F33"), 8, "'w' has dtype 'F33', expected one of F64, F32, "),
    "dtype in lower case": (one(dtype="f32"), 8, "'w' has dtype 'f32', expected one of"),
    "no dtype": (one(dtype=None), 8, "'w' has dtype None, expected one of"),
    "dtype that is a list": (one(dtype=["F32"]), 8, r"'w' has dtype \['F32'\], expected one of"),
    "half bytes": (one(dtype="F4", shape=[16]), 8, r"'w' has dtype 'F4' \(elements of less than a byte", STRICTER),
    "six bits": (
        one(dtype="F6_E2M3", shape=[4, 8], data_offsets=[0, 24]),
        24,
        "'w' has dtype 'F6_E2M3' .*byte",
        STRICTER,
    ),
    "six other bits": (one(dtype="F6_E3M2", shape=[4], data_offsets=[0, 3]), 3, "'w' has dtype 'F6_E3M2' .*", STRICTER),
    "a dtype for which there is no rule": (
        one(dtype="F8_E4M3FNUZ", shape=[8]),
        8,
        "'w' has dtype 'F8_E4M3FN",
        STRICTER,
    ),
    "a field that nobody knows": (one(scale=2), 8, "'w' is .*, expected dtype, shape and data_offsets, and", STRICTER),
    "a field missing": ({"w": {"dtype": "F32", "shape": [2]}}, 8, "'w' is .*, expected dtype, shape and data_offsets"),
    "a tensor that is a list": ({"w": ["F32", [2], [0, 8]]}, 8, "'w' is .*, expected dtype, shape and", STRICTER),
    "a tensor that is nothing": ({"w": None}, 0, "'w' is None, expected dtype, shape and data_offsets"),
    "a key twice": (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "has no safetensors header: the key 'w' stands there twice",
        STRICTER,
    ),
    "a key twice, once escaped": (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0077":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "the key 'w' stands there twice",
        STRICTER,
    ),
    "a field twice": (
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "the key 'dtype' stands there twice",
    ),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "the key '__metadata__' stands there twice"),
    "metadata with a key twice": (b'{"__metadata__":{"a":"1","a":"2"}}', 0, "the key 'a' stands there twice", STRICTER),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, r"__metadata__ is \{'a': 1\}, expected texts by name"),
    "metadata of nothing": ({"__metadata__": {"a": None}}, 0, r"__metadata__ is \{'a': None\}, expected texts by name"),
    "metadata in metadata": ({"__metadata__": {"a": {"b": "c"}}}, 0, "__metadata__ is .*, expected texts by name"),
    "metadata that is a text": ({"__metadata__": "pt"}, 0, "__metadata__ is 'pt', expected texts by name"),
    "no UTF-8": (b'{"\xff":{}}', 0, "has no safetensors header: byte 2 is not UTF-8"),
    "UTF-16": ('{"w":1}'.encode("utf-16"), 0, "has no safetensors header: byte 0 is not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", 0, "has no safetensors header: JSON: .*BOM"),
    "half a surrogate pair": (
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "half a surrogate pair",
    ),
    "NaN": (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8, "NaN is no JSON"),
    "Infinity": (b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', 8, "Infinity is no JSON"),
    "more than any number": (
        b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}',
        8,
        rf"'w' has shape \[inf\], {WHOLE}",
    ),
    "nested without end": (b'{"w":' + b"[" * 100_000, 0, "has no safetensors header: JSON: nested too deeply"),
    "nested and closed": (b'{"w":' + b"[" * 5000 + b"]" * 5000 + b"}", 0, "JSON: nested too deeply"),
    "nested within reason": (b'{"w":' + b"[" * 500 + b"]" * 500 + b"}", 0, "'w' is .*, expected dtype, shape"),
    "JSON and more": (b"{}{}", 0, "has no safetensors header: JSON: Extra data"),
    "a comma too many": (b'{"__metadata__":{},}', 0, "has no safetensors header: JSON: "),
    "control character": (b'{"a\nb":{}}', 0, "has no safetensors header: JSON: Invalid control character"),
    "a list": (b"[]", 0, "has no safetensors header: holds a list, expected an object"),
    "zeros": (bytes(504), 0, "has no safetensors header: JSON: "),
    "an endless name": ({"w" * 70_000: ENTRY}, 8, "is a name of 70,000 characters, expected at most 1,000", STRICTER),
}


def content(header: Any, size: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_with_file_key_and_reason(name, tmp_path):
    header, size, match, *stricter = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content(header, size))
    with pytest.raises(AdapterError, match=f"^{re.escape(str(path))}.*{match}") as refused:
        read_header(path)
    (text,) = refused.value.problems
    assert text.isprintable() and len(text) < 1000
    keys = {"'w'": ("w",), "'v'": ("v",), "is a name": ("w" * 70_000,)}
    assert refused.value.keys == next((key for start, key in keys.items() if match.startswith(start)), ())
    try:
        with safe_open(path, framework="pt"):
            assert stricter
    except SafetensorError:
        assert not stricter


SOUND: dict[str, tuple[dict[str, Any], int]] = {
    "a scalar": (one(shape=[], data_offsets=[0, 4]), 4),
    "no experts": (one(shape=[0, 4, 6], data_offsets=[0, 0]), 0),
    "nothing among others": ({"v": ENTRY | {"shape": [3, 0], "data_offsets": [8, 8]}, "w": ENTRY, "x": NEXT}, 16),
    "64 dimensions": (one(shape=[1] * 63 + [2]), 8),
    "a name of odd characters": ({"\n\x00/../\\\u202e\x7f": ENTRY}, 8),
    "no name": ({"": ENTRY}, 8),
    "a name of an object's own": ({"__proto__": ENTRY}, 8),
    "no metadata": ({"__metadata__": None} | one(), 8),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_header_is_read_as_the_library_reads_it(name, tmp_path):
    header, size = SOUND[name]
    data = bytes(range(1, size + 1))
    (tmp_path / "model.safetensors").write_bytes(content(header, 0) + data)
    (tmp_path / CONFIG).write_text("{}")
    opened = open_checkpoint(tmp_path)
    same(opened.read(opened.specs), load_file(tmp_path / "model.safetensors"))


def test_many_wrong_tensors_are_told_in_a_few_lines_with_every_key(tmp_path):
    header = {f"w{i}": ENTRY | {"dtype": "F33"} for i in range(10_000)}
    (tmp_path / "x.safetensors").write_bytes(content(header, 8))
    with pytest.raises(AdapterError, match="9,992 more tensors are wrong") as refused:
        read_header(tmp_path / "x.safetensors")
    assert len(refused.value.problems) == 9 and len(refused.value.keys) == 10_000


@pytest.mark.parametrize("filling", [b" ", b"[", b"1,", b'{"a":', b"{},"])
def test_a_large_header_is_refused_in_seconds(filling, tmp_path):
    size = 10_000_000
    text = b'{"w":[' + filling * ((size - 6) // len(filling))
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    start = time.monotonic()
    with pytest.raises(AdapterError, match="x.safetensors has no safetensors header: JSON"):
        read_header(tmp_path / "x.safetensors")
    assert time.monotonic() - start < 30


Change = Callable[[Path], object]
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path) -> Path:
    return lay(bases()["qwen3_moe"], tmp_path / "source")


def put(name: str, content: bytes | str) -> Change:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def instead(name: str, make: Change) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return change


def fields(name: str, **new: Any) -> Change:
    return lambda path: (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | new))


def mapped(**names: Any) -> Change:
    def change(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        index["weight_map"] |= names
        (path / INDEX).write_text(json.dumps(index))

    return change


def pickled(*names: str) -> Change:
    def change(path: Path) -> None:
        for file in [INDEX, A, B]:
            (path / file).unlink()
        for name in names:
            torch.save({"w": torch.ones(2)}, path / name)

    return change


def no_index(path: Path) -> None:
    (path / INDEX).unlink()
    (path / A).unlink()


OUTSIDE = r"is a link to '[^']*', outside of its directory: put the file itself there"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
DIRECTORIES: dict[str, tuple[Change, str]] = {
    "a link to the system": (instead(CONFIG, lambda p: p.symlink_to("/etc/passwd")), f"{CONFIG} {OUTSIDE}"),
    "a link out of it": (instead(A, lambda p: p.symlink_to("../outside")), f"{A} {OUTSIDE}"),
    "a link to the folder above": (instead(A, lambda p: p.symlink_to("..")), f"{A} {OUTSIDE}"),
    "a link to itself": (instead(A, lambda p: p.symlink_to(A)), f"{A} cannot be read: Too many levels"),
    "a link to a device": (instead(A, lambda p: p.symlink_to("/dev/zero")), f"{A} {OUTSIDE}"),
    "an index that is a link out": (instead(INDEX, lambda p: p.symlink_to("/etc/passwd")), f"{INDEX} {OUTSIDE}"),
    "an origin that is a link out": (instead(NATIVE, lambda p: p.symlink_to("/etc/passwd")), f"{NATIVE} {OUTSIDE}"),
    "a pipe for a shard": (instead(A, os.mkfifo), f"{A} is a pipe, a socket or a device, expected a file"),
    "a pipe for a config": (instead(CONFIG, os.mkfifo), f"{CONFIG} is a pipe, a socket or a device, expected a file"),
    "a pipe for an index": (instead(INDEX, os.mkfifo), f"{INDEX} is a pipe, a socket or a device, expected a file"),
    "a folder for a shard": (instead(A, lambda p: p.mkdir()), f"{A} is a directory, expected a file"),
    "a folder for a config": (instead(CONFIG, lambda p: p.mkdir()), f"{CONFIG} is a directory, expected a file"),
    "a folder for an index": (instead(INDEX, lambda p: p.mkdir()), f"{INDEX} is a directory, expected a file"),
    "a config beyond reading": (lambda p: os.truncate(p / CONFIG, 2**40), f"{CONFIG} has 1,099,511,627,776 bytes, exp"),
    "a file in a folder": (mapped(x="sub/x.safetensors"), f"{INDEX} names the file 'sub/x.safetensors': expected safe"),
    "a file above": (mapped(x="../x.safetensors"), f"{INDEX} names the file '../x.safetensors'"),
    "a file by its path": (mapped(x="/x.safetensors"), f"{INDEX} names the file '/x.safetensors'"),
    "a file of Windows": (mapped(x="..\\x.safetensors"), f"{INDEX} names the file '..\\\\\\\\x.safetensors'"),
    "a file with a line break": (mapped(x="a\nb.safetensors"), rf"{INDEX} names the file 'a\\nb.safetensors'"),
    "a file that no system has": (mapped(x="a\0.safetensors"), rf"{INDEX} names the file 'a\\x00.safetensors'"),
    "a file of too long a name": (mapped(x="x" * 300 + ".safetensors"), "x.safetensors cannot be read: File name too"),
    "a file without name": (mapped(x=""), f"{INDEX} names the file ''"),
    "a pickle in the index": (mapped(x="pytorch_model.bin"), "'pytorch_model.bin': .* pickle.* convert it to safetens"),
    "a number for a file": (mapped(x=1), f"{INDEX} has no weight_map of names to files: 'x' is in 1"),
    "nothing for a file": (mapped(x=None), f"{INDEX} has no weight_map of names to files: 'x' is in None"),
    "an endless name": (mapped(**{"x" * 2000: A}), f"{INDEX}: 'x.*' is a name of 2,000 characters, expected at most"),
    "a weight_map of pairs": (fields(INDEX, weight_map=[["w", A]]), f"{INDEX} has no weight_map of names to files"),
    "an index with a key twice": (
        put(INDEX, f'{{"weight_map": {{"w": "{A}", "w": "{B}"}}}}'),
        f"{INDEX} is no JSON: the key 'w' stands there twice",
    ),
    "an index with NaN": (put(INDEX, '{"weight_map": {}, "metadata": NaN}'), f"{INDEX} is no JSON: NaN is no JSON"),
    "an index in UTF-16": (put(INDEX, "{}".encode("utf-16")), f"{INDEX} is no JSON: byte 0 is not UTF-8"),
    "a config with a key twice": (
        put(CONFIG, '{"a": 1, "a": 1}'),
        f"{CONFIG} is no JSON: the key 'a' stands there twi",
    ),
    "half a surrogate pair": (put(CONFIG, '{"model_type": "\\udfff"}'), f"{CONFIG} is no JSON: a text in it has half"),
    "a shard of zeros": (put(A, bytes(4096)), f"{A} has no safetensors header: it begins with zeros, as an unfinished"),
    "a shard of nothing": (put(A, b""), f"{A} has 0 bytes, and its header would have 0: cut short"),
    "a shard of LFS": (put(A, LFS), f"{A} has .* bytes, .*: it is a Git LFS pointer: fetch .*git lfs pull"),
    "a config of LFS": (put(CONFIG, LFS), f"{CONFIG} is no JSON"),
    "a shard of HTML": (
        put(A, "<!DOCTYPE html><html>"),
        f"{A} has 21 bytes, .* it is a web page: the download went wr",
    ),
    "a shard of GGUF": (put(A, b"GGUF\x03\0\0\0" + bytes(64)), f"{A} has .* it is GGUF: .fmoe convert X"),
    "a pickle for a shard": (
        instead(A, lambda p: torch.save({}, p)),
        f"{A} has .* what torch.save writes, a pickle, which may run code .*: convert it to safetensors first",
    ),
    "an old pickle for a shard": (
        instead(A, lambda p: torch.save({}, p, _use_new_zipfile_serialization=False)),
        f"{A} has .* it is a pickle, which may run code .*: convert it to safetensors first",
    ),
    "pickles alone": (
        pickled("pytorch_model-00001-of-00001.bin"),
        "source holds no tensors in safetensors files, but 'pytorch_model-00001-of-00001.bin': a pickle, .* convert it",
    ),
    "torch's own pickles alone": (pickled("a.pt", "b.pth"), "holds no tensors .*, but 'a.pt', 'b.pth': a pickle"),
    "one of two shards, and no index": (no_index, f"{A} is not there, and {B} is: download it, or {INDEX}"),
    "a shard of another million": (
        lambda p: ((p / INDEX).unlink(), (p / A).rename(p / "model-00001-of-99999.safetensors")),
        "model-00002-of-99999.safetensors is not there, and model-00001-of-99999.safetensors is",
    ),
    "a file named over two lines": (
        lambda p: ((p / INDEX).unlink(), (p / A).rename(p / "a\nb.safetensors")),
        r"source has a file named 'a\\nb.safetensors': rename it",
    ),
    "more layers than the config says": (
        fields(CONFIG, num_hidden_layers=1),
        "num_hidden_layers 1, .* model.layers.1.",
    ),
    "fewer layers than the config says": (fields(CONFIG, num_hidden_layers=3), "layers 3, and no tensor is model.laye"),
    "a layer count beyond reason": (fields(CONFIG, num_hidden_layers=10**15), r"no tensor is model.layers.2.\*"),
    "more experts than the config says": (fields(CONFIG, num_experts=2), "layers.0.mlp.experts.2.gate_proj.weight"),
    "fewer experts than the config says": (fields(CONFIG, num_experts=4), "layers.0.mlp.experts.3.gate_proj.weight"),
    "experts beyond reason": (fields(CONFIG, num_experts=10**30), f"{CONFIG}: .*beyond 2"),
    "another hidden size": (fields(CONFIG, hidden_size=8), r"gate_proj.weight'.*: shape \[3, 4\], expected \[3, 8\]"),
    "another expert size": (
        fields(CONFIG, moe_intermediate_size=5),
        r"gate_proj.weight'.*: shape \[3, 4\], expected \[5, 4\]",
    ),
    "no experts": (fields(CONFIG, num_experts=0), "e < 0"),
    "an activation that is a list": (fields(CONFIG, hidden_act=[]), ""),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_hostile_directory_is_refused_at_once_with_file_key_and_reason(name, source):
    change, match = DIRECTORIES[name]
    (source.parent / "outside").write_bytes(b"secret")
    change(source)
    before, start = listing(source), time.monotonic()
    if not match:  # the tensors are sound: it converts, and only what the config cannot say is left open
        fmoe.verify(source)
        return
    with pytest.raises(AdapterError, match=match) as refused:
        fmoe.verify(source)
    assert all(text.isprintable() for text in refused.value.problems)
    assert listing(source) == before and time.monotonic() - start < 5


def listing(path: Path) -> dict[str, tuple[int, int]]:
    found = {p.name: os.lstat(p) for p in path.iterdir()}
    return {n: (s.st_size, s.st_mtime_ns) for n, s in found.items()}


LAYERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({"num_hidden_layers": 2}, ["model.layers.0.x", "model.layers.1.x"]),
    "of the text model": ({"text_config": {"num_hidden_layers": 1}}, ["model.language_model.layers.0.x"]),
    "numbered on": ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, ["model.layers.0.x", "model.layers.1.x"]),
    "left out, as it may be": ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, ["model.layers.0.x"]),
    "more of mtp": ({"num_hidden_layers": 1}, ["model.layers.0.x", "mtp.layers.0.x", "mtp.layers.1.x"]),
    "fewer in a tower": ({"num_hidden_layers": 2}, ["visual.layers.0.x", "layers.0.x", "layers.1.x"]),
    "not said": ({}, ["model.layers.7.x"]),
    "not numbered": ({"num_hidden_layers": 2}, ["model.norm", "layers.x"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_fit(name):
    config, names = LAYERS[name]
    layers_fit(Path(CONFIG), config, names)
    more = {"num_hidden_layers": 10} if "num_hidden_layers" in config else {"text_config": {"num_hidden_layers": 10}}
    if config and "layers.x" not in names:
        with pytest.raises(
            AdapterError, match=r"config.json says num_hidden_layers 10, and no tensor is .*layers.\d.\*"
        ):
            layers_fit(Path(CONFIG), config | more, names)


@pytest.mark.parametrize("beside", ["pytorch_model.bin", "consolidated.pth", "model.gguf"])
def test_pickles_beside_safetensors_are_taken_along_and_never_read(beside, source):
    (source / beside).write_bytes(b"\x80\x04.")
    opened = open_checkpoint(source)
    assert len(opened.specs) == 23 and Path(beside) in opened.others()
    fmoe.verify(source)


def test_a_stale_shard_that_the_index_leaves_out_is_not_even_opened(source):
    (source / "model-00003-of-00003.safetensors").write_bytes(b"broken")
    os.mkfifo(source / "model-00004-of-00004.safetensors")
    fmoe.verify(source)


def test_infinity_in_a_config_is_as_transformers_writes_it(source):
    (source / CONFIG).write_text((source / CONFIG).read_text()[:-1] + ', "time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(source).config["time_step_limit"] == [0.0, float("inf")]
    fmoe.verify(source)


# ---- links


@pytest.fixture
def hub(tmp_path, source) -> Path:
    """A Hugging Face cache: blobs named by hash, and a snapshot of links to them."""
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots" / "0a1b" / "sub").mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, root / "blobs" / f"{i:x}f00d")
        (root / "snapshots" / "0a1b" / file.name).symlink_to(f"../../blobs/{i:x}f00d")
    (root / "snapshots" / "0a1b" / "sub" / "note.txt").symlink_to("../../../blobs/0f00d")
    return root


def test_a_hugging_face_cache_is_read_through_its_links(hub, source, tmp_path):
    (tmp_path / "mine").symlink_to(hub / "snapshots" / "0a1b")
    for path in (hub / "snapshots" / "0a1b", tmp_path / "mine"):
        opened, expected = open_checkpoint(path), open_checkpoint(source)
        same(opened.read(opened.specs), expected.read(expected.specs))
        assert opened.others() == [Path(CONFIG), Path("sub/note.txt"), Path("tokenizer.json")]


@pytest.mark.parametrize("where", ["a blob that is a link", "a folder beside blobs", "another model's", "no snapshots"])
def test_a_cache_is_no_way_out(where, hub, tmp_path):
    path = hub / "snapshots" / "0a1b"
    (tmp_path / "secret").write_bytes((path / A).read_bytes())
    if where == "a blob that is a link":
        blob = (path / A).resolve()
        blob.unlink()
        blob.symlink_to(tmp_path / "secret")
    elif where == "no snapshots":
        path = (hub / "snapshots").rename(hub / "revisions") / "0a1b"
    else:
        folder = hub / "refs" if where == "a folder beside blobs" else tmp_path / "models--org--other" / "blobs"
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "secret", folder / "x")
        (path / A).unlink()
        (path / A).symlink_to(folder / "x")
    with pytest.raises(AdapterError, match=f"({A}|{CONFIG}) {OUTSIDE}"):
        open_checkpoint(path)


def test_links_within_a_directory_are_followed(source):
    (source / "weights").mkdir()
    (source / A).rename(source / "weights" / "a")
    (source / A).symlink_to("weights/a")
    fmoe.verify(source)


def test_links_from_folder_to_folder_within_a_directory_are_taken_along(source):
    (source / "a").mkdir()
    (source / "b").mkdir()
    (source / "a" / "x").write_text("x")
    (source / "b" / "x").symlink_to("../a/x")
    assert {Path("a/x"), Path("b/x")} <= set(open_checkpoint(source).others())


OTHERS: dict[str, tuple[Change, str]] = {
    "a link out": (lambda p: (p / "notes.txt").symlink_to("/etc/passwd"), f"notes.txt {OUTSIDE}"),
    "a link out, below": (lambda p: ((p / "d").mkdir(), (p / "d" / "x").symlink_to("/etc/passwd")), f"d/x {OUTSIDE}"),
    "a link to a folder": (lambda p: (p / "etc").symlink_to("/etc"), f"etc {OUTSIDE}"),
    "a link to a folder of its own": (
        lambda p: ((p / "d").mkdir(), (p / "e").symlink_to("d")),
        "e is a directory, exp",
    ),
    "a link to nothing": (lambda p: (p / "x").symlink_to("y"), "x cannot be read: No such file"),
    "a pipe": (lambda p: os.mkfifo(p / "tokenizer.model"), "tokenizer.model is a pipe, a socket or a device, expected"),
    "a name of two lines": (put("a\nb", ""), r"source has a file named 'a\\nb': rename it"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_taken_along_only_if_they_may_be(name, source):
    change, match = OTHERS[name]
    change(source)
    with pytest.raises(AdapterError, match=match):
        open_checkpoint(source).others()


# ---- files that fail, or change after they were opened


def refusing(path: Path, number: int) -> Callable[..., Any]:
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return call


@pytest.mark.parametrize("file", [CONFIG, INDEX, A])
def test_a_file_that_may_not_be_read_is_named(file, source, monkeypatch):
    opened = os.open
    refuse = refusing(source / file, 13)
    monkeypatch.setattr(os, "open", lambda p, *a, **k: (refuse if Path(p).name == file else opened)(p, *a, **k))
    with pytest.raises(AdapterError, match=f"{file} cannot be read: Permission denied"):
        open_checkpoint(source)


def test_a_directory_that_may_not_be_read_is_named(source, monkeypatch):
    monkeypatch.setattr(os, "listdir", refusing(source, 13))
    with pytest.raises(AdapterError, match="source cannot be read: Permission denied"):
        open_checkpoint(source)


def test_a_disk_that_fails_names_file_and_place(source, monkeypatch):
    opened = open_checkpoint(source)
    monkeypatch.setattr(os, "preadv", refusing(source, 5))
    with pytest.raises(AdapterError, match=f"{A} cannot be read at byte [0-9,]+: Input/output error"):
        opened.read(opened.specs)


def test_short_reads_are_continued(source, monkeypatch):
    opened, whole = open_checkpoint(source), os.preadv
    expected = opened.read(opened.specs)
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:3]], at))
    same(opened.read(opened.specs), expected)


def rewritten(path: Path) -> None:
    data, was = path.read_bytes(), os.stat(path).st_mtime_ns
    path.write_bytes(data[:-1] + b"\x07")
    os.utime(path, ns=(was, was + 1))


def exchanged(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


CHANGES: dict[str, tuple[Change, str]] = {
    "cut short": (
        lambda p: os.truncate(p, 100),
        r"has changed since it was opened \([0-9,]+ bytes, now 100\): nothing",
    ),
    "cut to nothing": (lambda p: os.truncate(p, 0), r"has changed since it was opened \([0-9,]+ bytes, now 0\)"),
    "grown": (lambda p: os.truncate(p, 10**6), r"has changed since it was opened \([0-9,]+ bytes, now 1,000,000\)"),
    "written to": (rewritten, r"has changed since it was opened \(the same size, written later\)"),
    "exchanged": (exchanged, "has changed since it was opened"),
    "gone": (lambda p: p.unlink(), "is not there"),
    "a pipe now": (lambda p: (p.unlink(), os.mkfifo(p)), "is a pipe, a socket or a device, expected a file"),
    "a link out now": (lambda p: (p.unlink(), p.symlink_to("/etc/passwd")), OUTSIDE),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_after_it_was_opened_is_refused(name, source):
    opened = open_checkpoint(source)
    change, match = CHANGES[name]
    change(source / A)
    for job in (lambda: opened.read(opened.specs), opened.unchanged):
        with pytest.raises(AdapterError, match=f"{A} {match}"):
            job()


@pytest.mark.parametrize("change", [lambda p: os.truncate(p, 100), rewritten], ids=["cut", "written to"])
def test_a_file_that_changes_while_it_is_read_is_refused(change, source, monkeypatch):
    opened, whole = open_checkpoint(source), os.preadv
    done: list[int] = []

    def change_then_read(fd: int, into: Any, at: int) -> int:
        if not done:
            done.append(change(source / A))  # type: ignore[func-returns-value]
        return whole(fd, into, at)

    monkeypatch.setattr(os, "preadv", change_then_read)
    with pytest.raises(AdapterError, match=f"{A} (ends before byte|has changed since it was opened)"):
        opened.read([n for n in opened.specs if opened.files[n] == A])


def test_a_pipe_put_there_between_the_look_and_the_opening_neither_waits_nor_leaks(source, monkeypatch):
    looked, sound = os.stat, os.stat(source / B)
    (source / A).unlink()
    os.mkfifo(source / A)
    monkeypatch.setattr(os, "stat", lambda p, *a, **k: sound if str(p).endswith(A) else looked(p, *a, **k))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AdapterError, match=f"{A} is a pipe, a socket or a device, expected a file"):
        open_checkpoint(source)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_leaves_no_descriptor_behind(source):
    before = len(os.listdir("/proc/self/fd"))
    opened = open_checkpoint(source)
    opened.read(opened.specs)
    (source / A).unlink()
    os.mkfifo(source / A)
    for job in (lambda: opened.read(opened.specs), lambda: open_checkpoint(source)):
        with pytest.raises(AdapterError):
            job()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- what a native directory says it was made from

ORIGINS: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "gguf"}, "has format 'gguf', expected 'fmoe native': update fmoe to read it"),
    "a later version": ({"version": 2}, "has version 2, expected 1: update fmoe to read it"),
    "an index that is none": ({"index": "{"}, "keeps an index that is none: JSON"),
    "an index of others": ({"index": '{"weight_map": {}}'}, "keeps an index whose weight_map is not its own"),
    "an index of a key twice": ({"index": '{"a": 1, "a": 2}'}, "keeps an index that is none: the key 'a' stands"),
    "metadata of numbers": ({"metadata": {A: {"a": 1}}}, f"has for '{A}' the metadata .*, expected texts by name"),
    "metadata in a list": ({"metadata": {A: [["a", "b"]]}}, f"has for '{A}' the metadata .*, expected texts by name"),
    "fewer than no bytes": ({"bytes": -1}, "has bytes -1, expected how many the tensors had"),
    "bytes in truth": ({"bytes": True}, "has bytes True, expected how many the tensors had"),
    "ranges of words": ({"ranges": {"e": ["0", "4"]}}, "has ranges .*, expected the first index and the end, by axis"),
    "ranges of one end": ({"ranges": {"e": [4]}}, "has ranges .*, expected the first index and the end, by axis"),
    "an empty range": ({"ranges": {"e": [4, 4]}}, "has ranges .*, expected the first index and the end, by axis"),
    "a range beyond reason": ({"ranges": {"e": [0, 2**64]}}, "has ranges .*, expected the first index and the end"),
    "a range of two lines": (
        {"ranges": {"e\n": [0, 1]}},
        "has ranges .*, expected the first index and the end, by axis",
    ),
    "ranges in a list": ({"ranges": [[0, 4]]}, "has ranges .*, expected the first index and the end, by axis"),
    "a file above": ({"weight_map": {"x": "../../x.safetensors"}}, "names the file '../../x.safetensors'"),
}


@pytest.mark.parametrize("name", ORIGINS)
def test_an_origin_that_could_not_be_is_refused(name, tmp_path):
    path = lay(bases()["native"], tmp_path / "native")
    new, match = ORIGINS[name]
    fields(NATIVE, **new)(path)
    with pytest.raises(AdapterError, match=f"{NATIVE} {match}"):
        open_checkpoint(path)


def test_offsets_say_where_the_bytes_are(source):
    opened: Checkpoint = open_checkpoint(source)
    for name, tensor in opened.read(opened.specs).items():
        data = (source / opened.files[name]).read_bytes()[opened.offsets[name] :]
        assert data.startswith(fmoe.types.bits(tensor).numpy().tobytes())


def test_a_read_of_the_engines_own_is_as_strict(source):
    opened = open_checkpoint(source)
    with disk.reading(source / A, opened.stamps[A]) as file, pytest.raises(AdapterError, match=f"{A} ends before byte"):
        disk.read_at(source / A, file, memoryview(bytearray(100)), opened.stamps[A].size - 1)


def test_odd_names_go_through_or_are_told_in_one_line(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "qwen3_moe"}))
    odd = {"a\nb", "../../x", "\x1b[31m", "", " ", "model.layers.0.mlp.experts.\n.gate_proj.weight", "{e}", "\u202e"}
    save_file({n: torch.ones(2) for n in odd}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError) as refused:
        fmoe.verify(tmp_path)
    assert refused.value.problems and all(text.isprintable() for text in refused.value.problems)
