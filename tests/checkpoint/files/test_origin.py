"""What a native directory says it was made from, read strictly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed_directories import A, fields
from tiny import NATIVE, bases, lay

from fmoe import AdapterError
from fmoe.checkpoint.files.directory import open_checkpoint

Change = Callable[[Path], object]


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
