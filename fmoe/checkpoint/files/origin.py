"""The files that say which tensor is where: the index of a Hugging Face checkpoint, and `fmoe.json` of a native one,
which keeps that index, and all else that the files held beside tensors, for the way back.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fmoe.checkpoint.files.header import PICKLE, described
from fmoe.checkpoint.files.strict import parse, short, too_long
from fmoe.checkpoint.remote.address import Where
from fmoe.types import AdapterError, as_dtype

if TYPE_CHECKING:
    from fmoe.layout.adapter import Adapter

# weight_map, metadata, index, bytes: of the source. headers: its files' headers that are not as fmoe writes them.
# checksums: sha256 of the native directory's other files.
ORIGIN = {"weight_map": dict, "metadata": dict, "index": str | None, "bytes": int}
FORMAT = {"format": "fmoe native", "version": 1}

OWN = {"adapter": "own"}
"""Among the choices of a native directory: rules of somebody's own made it, which nothing here can name.

`rules` beside it: the sha256 of what they print, resolved by the names that they were given.
"""


def weight_map(path: Where, index: Mapping[str, Any]) -> dict[str, str]:
    """The weight_map of an index, which is at path: names to safetensors files in the same directory, or below it."""
    found = index.get("weight_map")
    if not isinstance(found, dict):
        raise AdapterError(f"{path} has no weight_map of names to files")
    for name, file in found.items():
        if wrong := too_long(name):
            raise AdapterError(f"{path}: {short(name)} {wrong}")
        if not isinstance(file, str):
            raise AdapterError(f"{path} has no weight_map of names to files: {short(name)} is in {short(file)}")
    for file in dict.fromkeys(found.values()):
        within = not file.startswith("/") and ".." not in file.split("/")
        plain = within and "\\" not in file and file.isprintable()
        if not plain or not file.endswith(".safetensors"):
            why = f" (the others are {PICKLE})" if plain and file.endswith((".bin", ".pt", ".pth")) else ""
            raise AdapterError(f"{path} names the file {short(file)}: expected safetensors in {path.parent}{why}")
    return {name: PurePosixPath(file).as_posix() for name, file in found.items()}


def origin_of(path: Where, found: dict[str, Any]) -> dict[str, Any]:
    """What `fmoe.json` at path says a native directory was made from. Raises AdapterError where it could not be."""
    for field, value in FORMAT.items():
        if found.get(field, value) != value:
            raise AdapterError(f"{path} has {field} {short(found[field])}, expected {value!r}: update fmoe to read it")
    files = weight_map(path, found)
    if not all(n in found and isinstance(found[n], kind) for n, kind in ORIGIN.items()):
        raise AdapterError(f"{path} does not say what {path.parent} was made from: {', '.join(ORIGIN)}")
    if type(found["bytes"]) is not int or found["bytes"] < 0:
        raise AdapterError(f"{path} has bytes {short(found['bytes'])}, expected how many the tensors had")
    ranges = found.get("ranges", {})
    if not isinstance(ranges, dict) or not all(n.isidentifier() and _range(ends) for n, ends in ranges.items()):
        raise AdapterError(f"{path} has ranges {short(ranges)}, expected the first index and the end, by axis")
    choices = found.get("choices", {})
    if not isinstance(choices, dict) or not all(n.isidentifier() and isinstance(v, str) for n, v in choices.items()):
        raise AdapterError(f"{path} has choices {short(choices)}, expected the names of layouts, by choice")
    for file, texts in found["metadata"].items():
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise AdapterError(f"{path} has for {short(file)} the metadata {short(texts)}, expected texts by name")
    for field in ("headers", "checksums"):
        texts = found.get(field, {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise AdapterError(f"{path} has {field} {short(texts)}, expected texts by file")
    for file in found.get("checksums", {}):
        if not file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise AdapterError(f"{path} has a checksum of {short(file)}, expected a file in {path.parent}")
    for file, text in found.get("headers", {}).items():
        inside = {n for n, where in files.items() if where == file}
        if described(path.parent / file, head_of(text)).specs.keys() != inside:
            raise AdapterError(f"{path} keeps a header of {short(file)} with other tensors: convert the source again")
    if found["index"] is not None:
        try:
            index = weight_map(path, parse(found["index"].encode()))
        except (ValueError, TypeError) as error:
            raise AdapterError(f"{path} keeps an index that is none: {error}") from None
        if index != files:
            raise AdapterError(f"{path} keeps an index whose weight_map is not its own: convert the source again")
    return found | {"weight_map": files}


def held_ranges(origin: Mapping[str, Any] | None) -> dict[str, range]:
    """The ranges of axes that a native directory holds; {}: all of them.

    >>> held_ranges({"ranges": {"e": [0, 2]}}), held_ranges(None)
    ({'e': range(0, 2)}, {})
    """
    return {n: range(*ends) for n, ends in (origin or {}).get("ranges", {}).items()}


def rules_of(adapter: "Adapter", names: Iterable[str]) -> dict[str, str]:
    """The sha256 of what an adapter prints, resolved by names; {} where that says something else in each process.

    >>> import fmoe
    >>> {n: len(v) for n, v in rules_of(fmoe.rename("a", "b"), ["a"]).items()}
    {'rules': 64}
    """
    text = str(adapter.resolve(names))
    return {} if re.search(r" at 0x[0-9a-f]+", text) else {"rules": hashlib.sha256(text.encode()).hexdigest()}


def origin_text(
    files: Mapping[str, str],
    nbytes: int,
    index: str | None,
    choices: Mapping[str, Any],
    metadata: Mapping[str, Mapping[str, str]] = {},
    headers: Mapping[str, str] = {},
) -> bytes:
    """`fmoe.json` of a native directory that was made from HF tensors in these files, by these choices."""
    ranges = {n: [v.start, v.stop] for n, v in choices.items() if isinstance(v, range)}
    named = {n: v for n, v in choices.items() if isinstance(v, str)}
    named |= {"dtype": str(as_dtype(choices["dtype"])).removeprefix("torch.")} if choices.get("dtype") else {}
    named |= OWN | rules_of(choices["adapter"], files) if "adapter" in choices else {}
    facts: dict[str, Any] = {"weight_map": dict(files), "metadata": dict(metadata), "index": index, "bytes": nbytes}
    more = {"headers": dict(headers), "choices": named, "ranges": ranges}
    return json.dumps(FORMAT | facts | {n: v for n, v in more.items() if v}).encode() + b"\n"


def head_of(text: str) -> bytes:
    """The bytes before the data of a file whose header is this text."""
    return len(text.encode()).to_bytes(8, "little") + text.encode()


def with_checksums(text: bytes | Where, digests: Mapping[str, str]) -> bytes:
    """An origin's text, with the sha256 of the files that it lies beside."""
    assert isinstance(text, bytes)
    return json.dumps(json.loads(text) | {"checksums": dict(digests)}).encode() + b"\n"


def _range(ends: Any) -> bool:
    return isinstance(ends, list) and list(map(type, ends)) == [int, int] and 0 <= ends[0] < ends[1] < 2**63
