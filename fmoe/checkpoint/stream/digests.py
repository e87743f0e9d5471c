"""sha256 of whole files, on a few threads; and whether files are still those that were written."""

import os
import re
from collections.abc import Callable, Mapping

from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.disk import bytes_of, content, digest, identity, weak
from fmoe.checkpoint.files.weights import NATIVE, SUMS
from fmoe.checkpoint.remote.address import Address, Where
from fmoe.checkpoint.stream.carry import in_order, pool
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem

_LINE = re.compile(r"(\\?)([0-9a-f]{64})  ([^\0]+)")
_ESCAPES = {ord("\\"): r"\\", ord("\n"): r"\n", ord("\r"): r"\r"}
UNSWORN = "whether these are as they were written is not known: there is no digest of "


def checksums(paths: Mapping[str, Where], threads: int | None, progress: Callable[[int, int], None]) -> dict[str, str]:
    """sha256 of every file, by the same keys. progress: called with the bytes that are done, and all."""
    sizes = [bytes_of(path) for path in paths.values()]
    found, done = {}, 0
    with pool(threads) as executor:
        for name, size, (_, digested) in zip(paths, sizes, in_order(executor, digest, paths.values()), strict=True):
            found[name] = digested
            done += size
            progress(done, sum(sizes))
    return found


def sums_text(digests: Mapping[str, str]) -> bytes:
    """File -> sha256 as `sha256sum -c` reads them.

    >>> sums_text({"a": "0" * 64})[-4:]
    b'  a\\n'
    """
    names = {file: file.translate(_ESCAPES) for file in digests}
    marks = {file: "\\" * (name != file) for file, name in names.items()}
    return os.fsencode("".join(f"{marks[n]}{digests[n]}  {names[n]}\n" for n in sorted(digests)))


def kept_sums(folder: Where) -> dict[str, str]:
    """The digests that a conversion kept beside the files of a directory that is not native; none where it kept none.

    Raises AdapterError where they are not as `sums_text` writes them.
    """
    path = folder / SUMS
    if not (path.exists() if isinstance(path, Address) else os.path.lexists(path)):
        return {}
    text = os.fsdecode(content(path))
    lines = text.removesuffix("\n").split("\n") if text else []
    found = {line: _LINE.fullmatch(line) for line in lines}
    made = {line: (_plain(m[3]) if m[1] else m[3], m[2]) for line, m in found.items() if m}
    if wrong := [line for line in lines if line not in made or {"", ".", ".."} & {*made[line][0].split("/")}]:
        raise AdapterError(f"{path} has the line {wrong[0][:100]!r}, expected a sha256 and a file's name")
    return dict(made.values())


def _plain(name: str) -> str:
    escaped = {made: chr(was) for was, made in _ESCAPES.items()}
    return re.sub(r"\\.", lambda m: escaped.get(m[0], m[0]), name)


def unchanged(source: Checkpoint, was: Mapping[str, object]) -> None:
    """Raises AdapterError where a file is no longer the one of these `identities`; of some only a digest can tell."""
    source.unchanged()
    for file, stamp in source.stamps.items() if not isinstance(source.path, Address) else ():
        if weak(stamp) and identity(source.path / file, stamp) != was[file]:
            text = "has changed since it was opened (the same size, other bytes)"
            raise AdapterError(f"{source.path / file} {text}: nothing else may write to it; run again")


def untold(source: Checkpoint) -> list[str]:
    """A note that names the files of a server that says nothing by which to tell that they stay the same."""
    bare = [n for n, stamp in source.stamps.items() if isinstance(source.path, Address) and not stamp.tag]
    text = "whether these stay the same while they are read is not known, for the server gives no ETag"
    return [f"{text}: {some(bare)}"] if bare else []


def unsworn(source: Checkpoint, digests: Mapping[str, str]) -> tuple[str, ...]:
    """A note that names the files of a directory that have no digest, if any have none."""
    if isinstance(source.path, Address):
        there = source.path.names()
    else:
        there = sorted(p.relative_to(source.path).as_posix() for p in source.path.rglob("*") if p.is_file())
    lone = [n for n in there if n not in {*digests, NATIVE, SUMS} and not n.startswith(".")]
    return (f"{UNSWORN}{some(lone)}",) if lone else ()


def other_bytes(
    folder: Where, wanted: Mapping[str, str], threads: int | None = None, by: str = NATIVE
) -> list[Problem]:
    """Which files of a folder have another digest than was written down, or are not there."""
    exists = lambda path: path.exists() if isinstance(path, Address) else os.path.exists(path)
    there = {file: folder / file for file in wanted if exists(folder / file)}
    found = checksums(there, threads, lambda done, of: None)
    what = {file: f"sha256 {found[file][:16]}..." if file in found else "no such file" for file in wanted}
    return [
        Problem(f"{folder / file}: {what[file]}, expected {digest[:16]}..., as {by} has it: other bytes", (file,))
        for file, digest in wanted.items()
        if found.get(file) != digest
    ]
