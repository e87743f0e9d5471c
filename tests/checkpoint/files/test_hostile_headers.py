"""Headers that lie are refused with the file, the key and the reason, at once; what is sound is read.

They go to the safetensors library too: what it refuses we refuse, and the few things in which we are stricter are
marked so.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tiny import CONFIG

from fmoe import AdapterError
from fmoe.checkpoint.files.directory import open_checkpoint, read_header
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
    "nested and closed": (b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "JSON: nested too deeply"),
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
