"""What an Orbax checkpoint says of itself: its files, the paths of its tree, and which chunks of an array are there."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.strict import MOST, parse, short
from fmoe.checkpoint.files.weights import TREE
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem

PARAMS = "params"
ITEMS = ("", "items", "default")
"""Where in the directory of a step the arrays lie."""
_WORD = re.compile(r"\w+")
_OURS = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt", "commit_success.txt")


def home_of(path: Path) -> Path | None:
    """The folder of a path that holds Orbax's tree, or None."""
    return next((path / n for n in ITEMS if os.path.isfile(path / n / TREE)), None)


def written(array: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in array.chunk_layout.write_chunk.shape or ())


def decoded(array: Any) -> tuple[int, ...]:
    """What is decompressed at once: a chunk that is written, or one of those inside it."""
    return tuple(int(n) for n in array.chunk_layout.read_chunk.shape or ())


def files(home: Path) -> Iterator[str]:
    """The container's files. Raises AdapterError for a link, which tensorstore would follow anywhere."""
    for folder, names, files in os.walk(home):
        for name in (*names, *files):
            if os.path.islink(where := os.path.join(folder, name)):
                raise AdapterError(f"{where} is a link: an Orbax checkpoint has none")
        inside = Path(folder).relative_to(home)
        yield from (str(inside / n) for n in files if inside != Path() or n in _OURS)


def stamp(path: Path) -> disk.Stamp:
    with disk.reading(path) as file:
        return disk.Stamp.of(file)


def tree(path: Path, stamp: disk.Stamp) -> dict[str, Any]:
    if stamp.size > MOST:
        raise AdapterError(f"{path} has {stamp.size:,} bytes, expected at most {MOST:,}")
    text = bytearray(stamp.size)
    with disk.reading(path, stamp) as file:
        disk.read_at(path, file, memoryview(text), 0)
    try:
        return parse(bytes(text), infinite=True)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} is no JSON of an Orbax tree: {error}") from None


def named(home: Path, tree: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each parameter's name (its path below `params`, joined with -) and its key; and what else the tree names."""
    entries = tree.get("tree_metadata")
    if not isinstance(entries, dict):
        raise AdapterError(f"{home / TREE} has no tree_metadata")
    named, left_out = dict[str, str](), []
    for said, entry in entries.items():
        path = entry.get("key_metadata") if isinstance(entry, dict) else None
        words = [str(k.get("key")) if isinstance(k, dict) else "" for k in path or [None]]
        if not all(map(_WORD.fullmatch, words)):
            raise AdapterError([Problem(f"{home / TREE}: {short(said)} is no path of words", (str(said),))])
        if words[0] != PARAMS:
            left_out.append(".".join(words))
            continue
        name = "-".join(words[1:] if words[:2] == [PARAMS, PARAMS] else words)
        value = entry.get("value_metadata")
        kind = value.get("value_type") if isinstance(value, dict) else None
        if kind not in ("jax.Array", "np.ndarray") or name in named:
            why = "is there twice" if name in named else f"is {short(kind)}, expected an array"
            raise AdapterError([Problem(f"{home / TREE}: {name!r} {why}", (name,))])
        named[name] = ".".join(words)
    return named, tuple(left_out)


def same(home: Path, named: Mapping[str, str], there: Collection[str]) -> None:
    """Raises AdapterError where the tree and the arrays of params are not the same."""
    keys = set(named.values())
    lost = [n for n, key in named.items() if key not in there]
    more = sorted(set(there) - keys)
    problems = [Problem(f"{home}: {some(lost)}: no array, and {TREE} names it", tuple(lost))] if lost else []
    problems += [Problem(f"{home}: {some(more)}: arrays that {TREE} does not name", tuple(more))] if more else []
    if problems:
        raise AdapterError(problems)


def lost(array: Any, key: str, keys: Collection[str]) -> list[str]:
    """The chunks of an array that are not there: tensorstore would make them up."""
    counts = _counts(array)
    if prod(counts) > len(keys):
        return [f"of {prod(counts):,}, where the store has {len(keys):,} in all"]
    spell = _spelling(array)
    return [spell(at) for at in product(*map(range, counts)) if f"{key}/{spell(at)}" not in keys]


def plain(array: Any) -> bool:
    """Whether every chunk holds its numbers as they are, one behind the other, and none reaches over the edge."""
    return coding(array) == "raw" and not any(n % max(1, c) for n, c in zip(array.shape, written(array), strict=True))


def coding(array: Any) -> str:
    """What a chunk's numbers, one behind the other, are stored as: "raw", "zstd", or anything else: ""."""
    said = array.spec().to_json()["metadata"]
    if "codecs" in said:
        first, *more = said["codecs"]
        if first != {"name": "bytes", "configuration": {"endian": "little"}}:
            return ""
        kinds = [codec["name"] for codec in more]
    else:
        if said.get("filters") or said.get("order", "C") != "C" or str(said.get("dtype")).startswith(">"):
            return ""
        kinds = [said["compressor"]["id"]] if said.get("compressor") else []
    return {(): "raw", ("zstd",): "zstd"}.get(tuple(kinds), "")


def word(array: Any, first: Sequence[int]) -> str:
    """The file, below its array's key, of the chunk whose first number has that index."""
    return _spelling(array)(tuple(f // max(1, c) for f, c in zip(first, written(array), strict=True)))


def chunks(array: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The file of each chunk below its array's key, and the index of its first number."""
    spell, size = _spelling(array), written(array)
    for at in product(*map(range, _counts(array))):
        yield spell(at), tuple(i * n for i, n in zip(at, size, strict=True))


def _counts(array: Any) -> list[int]:
    return [-(-n // max(1, c)) for n, c in zip(array.shape, written(array), strict=True)]


def _spelling(array: Any) -> Callable[[tuple[int, ...]], str]:
    said = array.spec().to_json()["metadata"]
    if "zarr_format" in said and said["zarr_format"] == 2:
        return lambda at: said.get("dimension_separator", ".").join(map(str, at)) or "0"
    mark = said.get("chunk_key_encoding", {}).get("configuration", {}).get("separator", "/")
    return lambda at: mark.join(["c", *map(str, at)])
